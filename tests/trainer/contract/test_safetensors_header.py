"""The safetensors header against the library's own writer."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainer.contract.safetensors_header import ITEM_BYTES, HeaderError, read_header


@pytest.fixture
def written(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.int64),
        "scalar": np.float16(2),
        "flags": np.array([True, False]),
    }
    tensors["scalar"] = np.array(tensors["scalar"])
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


def test_every_tensor_is_where_the_header_says(written):
    path, tensors = written
    header, content = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert set(header.entries) == set(tensors)
    for name, tensor in tensors.items():
        entry = header.entries[name]
        assert entry.shape == tensor.shape
        assert content[entry.start : entry.stop] == tensor.tobytes()
        assert ITEM_BYTES[entry.dtype] == tensor.itemsize


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1], "cut off or damaged"),
        (lambda content: content[:5], "no safetensors file"),
        (lambda content: b"\xff" * 8 + content[8:], "no safetensors file"),
        (lambda content: content[:8] + b"}" + content[9:], "no safetensors file"),
    ],
)
def test_what_is_cut_or_damaged_is_refused_by_name(written, change, said):
    path, _ = written
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(HeaderError, match=rf"x\.safetensors is {said}"):
        read_header(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"__metadata__": 1},
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 400]}},
    ],
    ids=str,
)
def test_a_header_that_is_json_and_no_table_of_tensors_is_refused_by_name(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(HeaderError, match=r"x\.safetensors is (no safetensors file|cut off or damaged)"):
        read_header(path)
