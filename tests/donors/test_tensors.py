"""Safetensors without torch, against torch and the library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vpmoe_assets.donors.tensors import copy_tensors, read_header, save_bfloat16, seeded_normal, to_bfloat16
from vpmoe_assets.errors import DonorError


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_bfloat16_is_rounded_as_torch_rounds(values: list[float]):
    ours = to_bfloat16(np.array(values, dtype=np.float32))
    theirs = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (ours == theirs).all()


def test_seeded_values_are_nearly_normal_and_independent():
    values = seeded_normal(3, "a", (400, 500), 0.5).ravel()
    other = seeded_normal(3, "b", (400, 500), 0.5).ravel()
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 0.5) < 0.005
    assert abs((values**4).mean() / (values**2).mean() ** 2 - 2.7) < 0.05  # of a sum of four uniforms
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.01


def test_seeded_values_depend_on_seed_and_name_alone():
    first = seeded_normal(3, "a", (4,), 1.0)
    assert (first == seeded_normal(3, "a", (2, 2), 1.0).ravel()).all()
    assert (first != seeded_normal(4, "a", (4,), 1.0)).any()
    golden = [0.03663058951497078, -0.8814070820808411, -0.5919302701950073, 2.065901756286621]
    assert first.tolist() == golden


def test_written_files_are_read_by_the_library(tmp_path: Path):
    tensors = {"b": seeded_normal(1, "b", (3, 5), 1.0), "a": seeded_normal(1, "a", (7,), 1.0)}
    save_bfloat16(tensors, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    for name, values in tensors.items():
        assert torch.equal(read[name], torch.from_numpy(values).to(torch.bfloat16))
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (entry.dtype, entry.shape) for name, entry in header.items()} == {
        "a": ("BF16", (7,)),
        "b": ("BF16", (3, 5)),
    }


def test_some_tensors_of_large_files_are_copied_bit_for_bit(tmp_path: Path):
    first = {"x": torch.randn(4, 3).bfloat16(), "skipped": torch.ones(100)}
    second = {"y": torch.randn(5, dtype=torch.float32)}
    save_file(first, tmp_path / "1.safetensors")
    save_file(second, tmp_path / "2.safetensors")
    copy_tensors(
        {"x": tmp_path / "1.safetensors", "y": tmp_path / "2.safetensors"}, tmp_path / "out.safetensors"
    )
    read = load_file(tmp_path / "out.safetensors")
    assert sorted(read) == ["x", "y"]
    assert torch.equal(read["x"], first["x"])
    assert torch.equal(read["y"], second["y"])
    with pytest.raises(DonorError, match="holds no floating-point tensor z"):
        copy_tensors({"z": tmp_path / "1.safetensors"}, tmp_path / "no.safetensors")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x05\0\0\0\0\0\0\0[1,2", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DonorError, match="is no safetensors file"):
        read_header(tmp_path / "x.safetensors")
