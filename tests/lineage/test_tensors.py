"""Norms of the differences between checkpoints, against NumPy in float64 on what safetensors itself reads."""

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vpmoe_assets.lineage import tensors
from vpmoe_assets.lineage.errors import ArtifactDamaged, ComparisonError
from vpmoe_assets.lineage.tensors import compare_tensors


def checkpoint(directory, content):
    directory.mkdir(exist_ok=True)
    save_file(content, directory / "model.safetensors")
    return directory


@pytest.fixture
def two(tmp_path):
    draw = torch.Generator().manual_seed(1)
    same = torch.randn(7, 5, generator=draw)
    old = {
        "same": same,
        "float": torch.randn(11, 13, generator=draw),
        "bf16": torch.randn(40, generator=draw).to(torch.bfloat16),
        "half": torch.randn(9, generator=draw).to(torch.float16),
        "count": torch.arange(6),
        "zero": torch.zeros(3),
        "reshaped": torch.ones(4),
        "gone": torch.ones(2),
        "typed": torch.ones(4),
    }
    new = {
        **{name: value + 0.25 * torch.randn(value.shape, generator=draw).to(value.dtype)
           for name, value in old.items() if value.is_floating_point()},
        "same": same.clone(), "count": old["count"] * 2, "reshaped": torch.ones(2, 2), "new": torch.ones(1),
        "typed": torch.ones(4, dtype=torch.bfloat16),
    }  # fmt: skip
    del new["gone"]
    return checkpoint(tmp_path / "a", old), checkpoint(tmp_path / "b", new)


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_norms_are_those_of_numpy(two, block, monkeypatch):
    monkeypatch.setattr(tensors, "_BLOCK", block)
    found = compare_tensors(*two)
    with (
        safe_open(two[0] / "model.safetensors", "pt") as a,
        safe_open(two[1] / "model.safetensors", "pt") as b,
    ):
        wide = {
            name: [file.get_tensor(name).to(torch.float64).numpy() for file in (a, b)]
            for name in set(a.keys()) & set(b.keys())
        }
    del wide["reshaped"]
    changed = {each.name: each for each in found.changed}
    assert changed.keys() == {
        "float", "bf16", "half", "count", "zero", "reshaped", "gone", "new", "typed"
    }  # fmt: skip
    for name in ("float", "bf16", "half", "count"):
        one, other = wide[name]
        each = changed[name]
        assert each.norm == pytest.approx(np.linalg.norm(other - one), rel=1e-12)
        assert each.relative == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one), rel=1e-12)
        assert each.largest == np.abs(other - one).max()
        assert each.moved == np.mean(one != other)
    assert changed["zero"].relative is None
    assert (changed["typed"].norm, changed["typed"].new) == (0.0, "BF16[4]")
    assert (changed["gone"].new, changed["new"].old, changed["reshaped"].norm) == (None, None, None)
    whole = math.sqrt(sum(np.square(other - one).sum() for one, other in wide.values()))
    assert found.norm == pytest.approx(whole, rel=1e-12)
    size = math.sqrt(sum(np.square(one).sum() for one, _ in wide.values()))
    assert found.relative == pytest.approx(whole / size, rel=1e-12)
    assert found.same == 1


def test_equal_bits_are_the_same_whatever_they_mean_and_others_are_counted(tmp_path):
    nan = torch.tensor([1.0, math.nan, math.inf])
    a = checkpoint(tmp_path / "a", {"x": nan})
    assert compare_tensors(a, checkpoint(tmp_path / "b", {"x": nan.clone()})).changed == ()
    (found,) = compare_tensors(
        a, checkpoint(tmp_path / "c", {"x": torch.tensor([2.0, math.nan, 1.0])})
    ).changed
    assert (found.norm, found.not_finite) == (1.0, 2)


def test_a_cut_file_and_no_checkpoint_are_named(two, tmp_path):
    with pytest.raises(ComparisonError, match="only checkpoints have tensors"):
        compare_tensors(two[0], _empty(tmp_path))
    file = two[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactDamaged, match="cut off"):
        compare_tensors(*two)
    with pytest.raises(ComparisonError, match="is gone"):
        compare_tensors(two[0], tmp_path / "nowhere")


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"
