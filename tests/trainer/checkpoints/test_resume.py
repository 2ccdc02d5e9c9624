"""Resume checkpoints as files: complete or absent, kept as long as asked, refused when damaged."""

import json
import os
import random
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from trainer.checkpoints import checksums
from trainer.checkpoints.difference import largest_difference
from trainer.checkpoints.resume import (
    LATEST_NAME,
    CheckpointError,
    Checkpoints,
    RunState,
    TorchDistSave,
)
from trainer.job.distributed import (
    Layout,
    LayoutError,
    random_state,
    restore_random_state,
    seed_everything,
    session,
    together,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def layout() -> Iterator[Layout]:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    before = torch.are_deterministic_algorithms_enabled()
    with session("cpu") as found:
        yield found
    torch.use_deterministic_algorithms(before)


def state(iteration: int, **changes: object) -> RunState:
    values: dict[str, object] = {
        "iteration": iteration,
        "config_hash": "c0ffee",
        "samplers": {"synth_kd_v1": {"epoch": 0, "index": iteration, "pack_index_sha256": "ab"}},
        "schedule": {"steps": 100},
        "progress": {"tokens": {"total": iteration}},
    }
    return RunState(**(values | changes))  # type: ignore[arg-type]


def tensors(value: float = 0.0) -> dict[str, object]:
    data = {"w": torch.full((3, 2), value), "b": torch.full((2,), value, dtype=torch.float64)}
    return {name: ShardedTensor.from_rank_offsets(f"model.{name}", tensor) for name, tensor in data.items()}


def save(checkpoints: Checkpoints, iteration: int, value: float = 1.0) -> Path:
    return checkpoints.save(tensors(value), state(iteration), {"made": "here"})


def test_a_checkpoint_comes_back_whole(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path / "checkpoints", layout, keep_last=2)
    assert checkpoints.latest() is None
    path = save(checkpoints, 5, 2.5)
    assert checkpoints.latest() == 5
    assert (tmp_path / "checkpoints" / LATEST_NAME).read_text() == "5\n"
    assert json.loads((path / "provenance.json").read_text()) == {"made": "here"}
    assert checkpoints.read_matching(5, state(0)) == state(5)
    loaded = checkpoints.load(5, tensors(), seed=1)
    assert torch.equal(loaded["w"], torch.full((3, 2), 2.5))
    assert loaded["b"].dtype == torch.float64


def test_retention_keeps_the_last_the_round_and_the_protected(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2, keep_every=10, protect={3})
    for iteration in (1, 3, 8, 10, 12, 20, 21):
        save(checkpoints, iteration)
    assert checkpoints.iterations() == [3, 10, 20, 21]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000003",
        "iter_0000010",
        "iter_0000020",
        "iter_0000021",
        LATEST_NAME,
    ]


def test_a_save_that_fails_leaves_the_one_before_and_no_half(tmp_path, layout, monkeypatch):
    class DiskFull(TorchDistSave):
        def save(self, sharded_state_dict, checkpoint_dir):
            super().save(sharded_state_dict, checkpoint_dir)
            raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, layout, keep_last=1)
    save(checkpoints, 1)
    monkeypatch.setattr(Checkpoints, "strategy", DiskFull)
    with pytest.raises(OSError, match="No space left"):
        save(checkpoints, 2)
    assert checkpoints.latest() == 1
    monkeypatch.undo()
    save(checkpoints, 2)
    assert checkpoints.iterations() == [2]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_reported_with_its_cause(tmp_path, layout, monkeypatch):
    def full(self, plan, planner):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, layout, keep_last=1)
    save(checkpoints, 1)
    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", full)
    with pytest.raises(CheckpointError, match=r"iter_0000002 could not be written.*rank 0.*No space left"):
        save(checkpoints, 2)
    assert checkpoints.latest() == 1


def test_zip_checksums_are_off_inside_a_save_alone(tmp_path, layout, monkeypatch):
    seen = []
    write = torch.distributed.checkpoint.FileSystemWriter.write_data

    def watched(self, plan, planner):
        seen.append(torch.serialization.get_crc32_options())
        if len(seen) > 1:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", watched)
    checkpoints = Checkpoints(tmp_path, layout, keep_last=1)
    save(checkpoints, 1, 3.0)
    assert torch.serialization.get_crc32_options()
    with pytest.raises(CheckpointError, match="No space left"):
        save(checkpoints, 2)
    assert torch.serialization.get_crc32_options()
    assert seen == [False, False]
    assert checkpoints.load(1, tensors(), seed=1)["w"][0, 0] == 3.0


def test_saving_a_step_again_replaces_it(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    save(checkpoints, 4, 1.0)
    save(checkpoints, 4, 2.0)
    assert checkpoints.iterations() == [4]
    assert checkpoints.load(4, tensors(), seed=1)["w"][0, 0] == 2.0


@pytest.mark.parametrize("victim", ["*.distcp", ".metadata", "metadata.json", "random/rank_00000.json"])
@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_damaged_file_is_named(victim, harm, tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    file = next(save(checkpoints, 5).glob(victim))
    if harm == "remove":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=file.name) as error:
        checkpoints.read_matching(5, state(0))
    assert "remove this checkpoint" in str(error.value)


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first byte", "middle", "last byte"])
@pytest.mark.parametrize("block", [100, checksums.BLOCK_BYTES], ids=["many blocks", "one block"])
def test_a_flipped_bit_in_any_file_is_named_and_the_checkpoint_before_offered(
    where, block, tmp_path, layout, monkeypatch
):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", block)
    checkpoints = Checkpoints(tmp_path, layout, keep_last=3)
    before, path = save(checkpoints, 4), save(checkpoints, 5)
    assert checkpoints.read_matching(5, state(0)) == state(5)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {str(file.relative_to(path)) for file in files} == {
        ".metadata",
        "__0_0.distcp",
        "metadata.json",
        "provenance.json",
        "random/rank_00000.json",
        "state.json",
    }
    for file in files:
        whole = file.read_bytes()
        flip(file, int(where * (len(whole) - 1)), bit=6)
        with pytest.raises(CheckpointError, match=f"{file.relative_to(path)} ") as error:
            checkpoints.read_matching(5, state(0))
        assert "remove this checkpoint and start the same job again" in str(error.value)
        assert f"resume from the one before, {before.name}" in str(error.value)
        file.write_bytes(whole)
    assert checkpoints.read_matching(5, state(0)) == state(5)


def test_every_single_bit_of_the_state_is_guarded(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    file = save(checkpoints, 5) / "state.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        flip(file, place, bit=place % 8)
        with pytest.raises(CheckpointError):
            checkpoints.read(5)
        file.write_bytes(whole)


def test_of_a_damaged_checkpoint_with_others_after_it_those_are_named_too(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=3)
    path, after = save(checkpoints, 4), save(checkpoints, 5)
    flip(path / "metadata.json", 3)
    checkpoints.verify(5)
    with pytest.raises(CheckpointError, match=rf"those after it \({after.name}\).*there is none before it"):
        checkpoints.verify(4)


def test_a_checkpoint_of_an_earlier_version_is_refused_with_a_remedy(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    file = save(checkpoints, 5) / "state.json"
    old = json.loads(file.read_text()) | {"schema": "vpmoe.resume/1"}
    file.write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=r"vpmoe\.resume/1.*execution\.resume = false"):
        checkpoints.read(5)


def test_checksums_are_those_of_zlib_whatever_the_blocks(tmp_path, monkeypatch):
    content = random.Random(1).randbytes(10_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"")
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 3_000)
    monkeypatch.setattr(checksums, "_PIECE_BYTES", 700)
    found = checksums.checksums(tmp_path, ["b", "a"])
    assert found["b"] == checksums.FileSum(0, ())
    assert found["a"].bytes == 10_000
    assert [int(value, 16) for value in found["a"].crc32] == [
        zlib.crc32(content[start : start + 3_000]) for start in range(0, 10_000, 3_000)
    ]


def test_an_unreadable_state_is_refused(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    (save(checkpoints, 5) / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoints.read(5)


@pytest.mark.parametrize(
    ("expect", "both"),
    [
        ({"config_hash": "decaf"}, ("c0ffee", "decaf")),
        ({"schedule": {"steps": 200}}, ("100", "200")),
        ({"samplers": {"healing_text_v1": {}}}, ("synth_kd_v1", "healing_text_v1")),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_naming_both_sides(expect, both, tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    save(checkpoints, 5)
    with pytest.raises(CheckpointError) as error:
        checkpoints.read_matching(5, state(0, **expect))
    for text in both:
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["tp", "ep"])
def test_another_model_parallel_size_is_refused_and_another_data_parallel_size_is_not(name, tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    save(checkpoints, 5)
    sizes = {"tp": 1, "ep": 1, "dp": 2} | {name: 2}
    other = Checkpoints(tmp_path, Layout(0, 2, device=CPU, **sizes), keep_last=2)
    with pytest.raises(CheckpointError, match=f"{name} = 1.*{name} = 2"):
        other.read_matching(5, state(0))
    wide = Checkpoints(tmp_path, Layout(0, 2, 1, 1, 2, CPU), keep_last=2)
    assert wide.read_matching(5, state(0)).iteration == 5


def test_going_on_with_another_number_of_threads_is_said(tmp_path, layout, caplog):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    save(checkpoints, 5)
    checkpoints.load(5, tensors(), seed=1)
    assert said(caplog) == []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        checkpoints.load(5, tensors(), seed=1)
    finally:
        torch.set_num_threads(threads)
    (message,) = said(caplog)
    assert f"{threads + 1} threads instead of {threads}" in message
    assert f"OMP_NUM_THREADS={threads} keeps the bits" in message


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of the trainer's own."""
    return [
        r.getMessage() for r in caplog.records if r.name.startswith("trainer") and r.levelname == "WARNING"
    ]


def test_a_tensor_that_is_missing_or_unexpected_is_an_error(tmp_path, layout):
    from megatron.core.dist_checkpointing.core import CheckpointingException

    checkpoints = Checkpoints(tmp_path, layout, keep_last=2)
    save(checkpoints, 5)
    fewer = tensors()
    del fewer["b"]
    more = tensors() | {"x": ShardedTensor.from_rank_offsets("model.x", torch.zeros(1))}
    for wanted in (fewer, more):
        with pytest.raises(CheckpointingException, match=r"model\.[bx]"):
            checkpoints.load(5, wanted, seed=1)


def test_the_largest_difference_is_0_only_for_equal_bits(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path, layout, keep_last=1)
    path = save(checkpoints, 1, 1.0)
    assert largest_difference(tensors(1.0), path) == 0.0
    changed = tensors(1.0)
    changed["w"].data[2, 1] += 2**-20
    assert largest_difference(changed, path) == 2**-20
    changed["b"].data[0] = float("nan")
    assert largest_difference(changed, path) == float("inf")


def test_tensors_are_compared_piece_by_piece(tmp_path, layout, monkeypatch):
    """Differences are found wherever they lie, and no more than one stored piece is held at a time."""
    from trainer.checkpoints import difference

    monkeypatch.setattr(difference, "_SLICE", 5)
    checkpoints = Checkpoints(tmp_path, layout, keep_last=1)
    data = {name: torch.randn(7, 9) for name in "abcdefgh"}

    def sharded(values: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
        return {name: ShardedTensor.from_rank_offsets(name, value) for name, value in values.items()}

    path = checkpoints.save(dict(sharded(data)), state(1), {})
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0
    resolve = difference._Comparison.resolve_tensor

    def counting(self, item):
        nonlocal most
        room = resolve(self, item)
        held.append(weakref.ref(room))
        most = max(most, sum(found() is not None for found in held))
        return room

    monkeypatch.setattr(difference._Comparison, "resolve_tensor", counting)
    assert largest_difference(sharded(data), path) == 0.0
    assert len(held) == 8
    assert most <= 2, "the piece before is let go when the next one is there"
    for name in data:
        changed = {other: value.clone() for other, value in data.items()}
        changed[name][6, 8] += 0.5
        expected = float((changed[name].double() - data[name].double()).abs().max())
        assert largest_difference(sharded(changed), path) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"x": torch.zeros(2)}, "lacks model.x"),
        ({"b": torch.zeros(2)}, r"model\.b is .*float64.*float32"),
        ({"w": torch.zeros(3, 3)}, r"model\.w is \(\(3, 2\)"),
    ],
    ids=["missing", "another type", "another shape"],
)
def test_what_cannot_be_compared_is_refused(wanted, message, tmp_path, layout):
    path = save(Checkpoints(tmp_path, layout, keep_last=1), 1)
    ours = {name: ShardedTensor.from_rank_offsets(f"model.{name}", data) for name, data in wanted.items()}
    with pytest.raises(CheckpointError, match=message):
        largest_difference(ours, path)


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata"])
def test_damage_met_while_comparing_is_an_ordinary_error(victim, tmp_path, layout):
    """Torch's own loader raises a `BaseException` there, which nothing that handles errors would catch."""
    path = save(Checkpoints(tmp_path, layout, keep_last=1), 1)
    (path / victim).write_bytes(b"nonsense" * 1000)
    ours = {name: tensor for name, tensor in tensors(1.0).items() if isinstance(tensor, ShardedTensor)}
    with pytest.raises(CheckpointError, match=f"{path.name} could not be read"):
        largest_difference(ours, path)


def test_all_random_states_come_back():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(7, CPU)
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    stored = json.loads(json.dumps(random_state(CPU)))
    expected = [draw() for _ in range(3)]
    seed_everything(8, CPU)
    assert draw() != expected[0]
    restore_random_state(stored, CPU)
    assert [draw() for _ in range(3)] == expected


def test_random_states_of_a_gpu_are_not_put_on_a_cpu():
    stored = random_state(CPU) | {"torch_cuda": "AAAA"}
    with pytest.raises(ValueError, match="stored on cuda cannot be put back on cpu"):
        restore_random_state(stored, CPU)


def test_work_of_the_leader_raises_its_own_error():
    with pytest.raises(OSError, match="disk"):
        together(lambda: (_ for _ in ()).throw(OSError("disk")))
    assert together(lambda: 5) == 5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 2}, "tensor-parallel groups of 2"),
        ({"ep": 2}, "ep = 2 must divide the data-parallel size 1"),
        ({"dp": 3}, "needs 3 processes and 1 were started"),
        ({"tp": 0}, "sizes start at 1"),
    ],
)
def test_sizes_that_do_not_fit_the_world_are_refused(sizes, message):
    with pytest.raises(LayoutError, match=message), session("cpu", **sizes):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_with_a_remedy():
    with pytest.raises(LayoutError, match="set device = 'cpu'"), session("cuda"):
        pass
