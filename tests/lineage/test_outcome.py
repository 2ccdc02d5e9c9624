"""Where two artifacts differ first: file, tensor, step."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage import tensor_change as module
from vpmoe_assets.lineage.outcome import first_file, first_step
from vpmoe_assets.lineage.tensor_change import tensor_change


@pytest.fixture
def pair(store, tmp_path):
    """Publish two artifacts, and return how their payloads differ first."""

    def compared(old: dict[str, bytes], new: dict[str, bytes]):
        records = [publish(store, "made", files=files) for files in (old, new)]
        return first_file(records[0], store.payload(records[0]), records[1], store.payload(records[1]))

    return compared


def test_equal_payloads_have_no_difference(pair):
    assert pair({"a": b"1", "b/c": b"2"}, {"b/c": b"2", "a": b"1"}) is None


def test_the_first_byte_and_the_first_key_are_named(pair):
    found = pair(
        {"a": b"same", "b.bin": b"01234567", "c": b"1"}, {"a": b"same", "b.bin": b"0123x567", "c": b"2"}
    )
    assert str(found) == "b.bin: from byte 4 on (2 of 3 files differ)"
    assert pair({"a": b"0123"}, {"a": b"01"}).what == "4 → 2 bytes, from byte 2 on"
    old, new = ({"a": {"b": [1, {"c": each}]}, "z": each} for each in (2, 3))
    found = pair({"c.json": json.dumps(old).encode()}, {"c.json": json.dumps(new).encode()})
    assert found.what == "a.b[1].c: 2 → 3"


def test_files_that_are_made_on_one_side_alone_are_named(pair):
    assert pair({"a": b"1", "b": b"2"}, {"a": b"1"}).what == "no longer made"
    assert pair({"a": b"1"}, {"a": b"1", "b": b"2"}).what == "not made before"


def test_of_weights_the_first_tensor_is_named_with_how_far_it_differs(pair, tmp_path):
    old = {"a": torch.zeros(3), "w": torch.arange(12.0).reshape(3, 4), "x": torch.ones(2)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["w"][1, 2] += 0.5
    new["x"][0] = 2
    files = []
    for number, tensors in enumerate((old, new)):
        save_file(tensors, tmp_path / str(number))
        files.append(
            {
                "config.json": json.dumps(number).encode(),
                "m.safetensors": (tmp_path / str(number)).read_bytes(),
            }
        )
    found = pair(*files)
    assert (found.path, found.tensor.name, found.tensor.differing) == ("m.safetensors", "w", 2)
    norm = 0.5 / float(old["w"].norm())
    assert found.tensor.what == (
        "F32[3, 4], 1 of 12 elements differ, the first at [1, 2]: 6 → 6.5; largest difference 0.5, "
        f"norm of it {norm:.3g} of its own"
    )


def test_tensors_of_another_shape_or_that_are_gone_are_told(tmp_path):
    for name, tensors in {
        "a": {"x": torch.ones(2)},
        "b": {"x": torch.ones(3)},
        "c": {"y": torch.ones(2)},
    }.items():
        save_file(tensors, tmp_path / name)
    assert tensor_change(tmp_path / "a", tmp_path / "b").what == "F32[2] → F32[3]"
    assert tensor_change(tmp_path / "a", tmp_path / "c").what == "no longer there"
    save_file({"x": torch.zeros(2)}, tmp_path / "zeros")
    assert tensor_change(tmp_path / "zeros", tmp_path / "a").what.endswith("it was all zeros")
    (tmp_path / "d").write_bytes(b"no weights")
    assert tensor_change(tmp_path / "a", tmp_path / "d") is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    chunk=st.sampled_from([8, 16, 64]),
)
def test_counts_and_places_are_those_of_torch(tmp_path, monkeypatch, dtype, size, seed, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    draw = np.random.default_rng(seed)
    old = torch.from_numpy(draw.integers(0, 3, size)).to(dtype)
    new = torch.where(torch.from_numpy(draw.random(size) < 0.3), torch.ones_like(old), old)
    save_file({"t": old}, tmp_path / "old")
    save_file({"t": new}, tmp_path / "new")
    found = tensor_change(tmp_path / "old", tmp_path / "new")
    places = torch.nonzero(old != new).flatten().tolist()
    if not places:
        assert found is None
        return
    assert f", {len(places)} of {size} elements differ, the first at [{places[0]}]: " in found.what
    largest = (old.double() - new.double()).abs().max().item()
    assert f"largest difference {largest:.3g}," in found.what


def test_the_first_step_whose_metrics_differ_is_named_and_what_a_clock_decides_is_not(tmp_path):
    lines = [
        {"step": 0, "heldout_loss": 9.0},
        {"step": 1, "loss": 8.0, "grad_norm": 1.0, "step_ms": 10.0, "tokens_per_second": 5.0},
        {"step": 2, "loss": 7.0, "grad_norm": 2.0, "rollouts/teacher_share": 0.1},
        {"shard": "train/shard_00", "seconds": 3.05},
    ]
    for run, changes in {
        "a": {},
        "b": {"step_ms": 11.0},
        "c": {"grad_norm": 3.0, "loss": 6.0},
        "d": None,
    }.items():
        (tmp_path / run).mkdir()
        own = lines[:2] if changes is None else [*lines[:2], {**lines[2], **changes}, lines[3]]
        (tmp_path / run / "metrics.jsonl").write_text(
            "".join(f"{json.dumps(each)}\n" for each in own) + "{torn"
        )
    assert first_step(tmp_path / "a", tmp_path / "b") is None
    found = first_step(tmp_path / "a", tmp_path / "c")
    assert (found.step, str(found)) == (2, "step 2: loss 7.0 → 6.0 and 1 more metrics")
    assert first_step(tmp_path / "a", tmp_path / "d").step == 2, "it ended before"
    assert first_step(tmp_path / "a", tmp_path / "nowhere").step == 0
