"""The index header against megatron-core's own writer."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from trainer.contract.indexed import DTYPES, HEADER_BYTES, pack_header, unpack_header


@pytest.mark.parametrize(("code", "name"), DTYPES.items())
def test_the_header_is_that_of_megatron(tmp_path, code, name):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.dtype(name).type)
    for length in (3, 1, 5):
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "x.idx"))
    written = (tmp_path / "x.idx").read_bytes()
    assert pack_header(code, 3) == written[:HEADER_BYTES]
    header = unpack_header(written)
    assert header.known
    assert (header.code, header.sequences, header.documents) == (code, 3, 4)
    assert header.file_bytes == len(written)


def test_another_magic_or_version_is_not_known():
    content = pack_header(1, 2)
    assert not unpack_header(b"X" + content[1:]).known
    assert not unpack_header(content[:9] + b"\x02" + content[10:]).known
