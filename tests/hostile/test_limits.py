"""What hostile input could cost: refused before it is read, unpacked or allocated."""

import gzip
import io
import json
import struct
import tarfile
import zipfile

import pytest

from trainer.contract.json_text import JsonError, json_lines, parse_json
from trainer.contract.safetensors_header import HeaderError, read_header
from trainer.errors import EvaluationError
from trainer.evaluate.bundle import TABLE_NAME, read_bundle
from vpmoe_assets.codebase import snapshot
from vpmoe_assets.codebase.snapshot import SnapshotError, pack, unpack
from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.published import zip_tasks


class Endless(io.RawIOBase):
    """A line without an end, which counts what was read of it."""

    read_bytes = 0

    def readline(self, size=-1):
        assert size > 0, "it would take all memory"
        self.read_bytes += size
        return b"x" * size


def test_a_line_without_end_is_refused_after_as_much_as_a_line_may_have():
    stream = Endless()
    with pytest.raises(JsonError, match="line 1: more than 1000 bytes"):
        list(json_lines(stream, most=1000))
    assert stream.read_bytes == 1001


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, b"\xff", "", "{"])
def test_whatever_is_wrong_with_json_is_one_error(text):
    with pytest.raises(JsonError):
        parse_json(text)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0.0, 24.0]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 2**60]},
        {"dtype": "X9", "shape": [-1], "data_offsets": [0, 24]},
    ],
    ids=["negative sizes", "offsets with a point", "2^60 bytes", "a size below zero of an unknown type"],
)
def test_a_tensor_of_impossible_size_is_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(HeaderError, match=r"x\.safetensors"):
        read_header(path)


def test_a_zip_member_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    path, name = tmp_path / "x.zip", "eval_bundle/eval_meta_data.csv"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"")
    content = bytearray(path.read_bytes())
    claimed = content.index(b"PK\x01\x02") + 24  # of the central directory: bytes unpacked
    content[claimed : claimed + 4] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)
    with pytest.raises(DataError, match="unpacks to 4294967294 bytes"):
        zip_tasks(path)


def test_a_sparse_member_of_an_archive_of_sources_makes_no_zeros():
    member = tarfile.TarInfo("a.py")
    member.pax_headers = {"GNU.sparse.size": str(2**60), "GNU.sparse.map": f"{2**60},0"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    with pytest.raises(SnapshotError):
        unpack(gzip.compress(buffer.getvalue()))


def test_an_archive_of_sources_is_unpacked_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(snapshot, "_MOST_BYTES", 1 << 16)
    with pytest.raises(SnapshotError, match="unpacks to at most 65536 bytes"):
        unpack(pack({"a.py": bytes(1 << 17)}))


def test_a_bundle_names_no_file_outside_its_directory(tmp_path):
    (tmp_path / "outside").write_text("{}\n")
    task = {
        "label": "a",
        "type": "schema",
        "baseline_percent": 0,
        "file": "../outside",
        "sha256": "",
        "rows": 1,
    }
    table = {"schema": "vpmoe.core8_bundle/1", "source": {}, "tasks": [task]}
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / TABLE_NAME).write_text(json.dumps(table))
    with pytest.raises(EvaluationError, match=r"'\.\./outside' is none of the bundle's directory"):
        read_bundle(tmp_path / "bundle")
