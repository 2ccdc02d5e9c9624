"""Following metrics and logs while another process writes them."""

import json
import os
import tracemalloc
from pathlib import Path

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.resources.tail import (
    MAX_OBSERVATIONS,
    FileTail,
    LogSpaced,
    LogTail,
    MetricsTail,
    last_lines,
)

KEY = dg.AssetKey(["smoke", "vpmoe_stage1"])


def logged(path: Path, steps: range, **more: float) -> None:
    with path.open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "train/loss": 1.0 / (step + 1), **more}) + "\n")


def steps_of(tail: MetricsTail) -> list[int]:
    return [observation.metadata["step"].value for observation in tail.observations(KEY)]


def test_a_file_that_does_not_exist_yet_has_no_lines(tmp_path: Path) -> None:
    tail = FileTail(tmp_path / "later")
    assert list(tail.lines()) == []
    (tmp_path / "later").write_bytes(b"one\n")
    assert list(tail.lines()) == [b"one"]


@given(st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b), max_size=12), st.data())
def test_any_cut_of_the_writes_gives_the_same_lines(lines: list[bytes], data: st.DataObject) -> None:
    import tempfile

    content = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        tail, seen = FileTail(path), []
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            with path.open("ab") as file:
                file.write(content[begin:end])
            seen += list(tail.lines())
    assert seen == lines


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"1\n2\n3")
    tail = FileTail(path)
    assert list(tail.lines()) == [b"1", b"2"]
    (tmp_path / "new").write_bytes(b"1\n2\n4\n5\n")
    os.replace(tmp_path / "new", path)
    assert list(tail.lines()) == [b"1", b"2", b"4", b"5"]


def test_a_truncated_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"1\n2\n3\n")
    tail = FileTail(path)
    assert len(list(tail.lines())) == 3
    path.write_bytes(b"9\n")
    assert list(tail.lines()) == [b"9"]


def test_memory_stays_flat_over_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 1.25}\n' * 400_000)
    tail = FileTail(path)
    tracemalloc.start()
    count = sum(1 for _ in tail.lines())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400_000
    assert peak < 16 << 20  # one block of 1 MiB and its lines; the file has 12 MiB


def test_an_endless_line_is_refused_instead_of_filling_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * (18 << 20))
    with pytest.raises(ValueError, match="a line of more than"):
        list(FileTail(path).lines())


@given(total=st.integers(1, 10**6), count=st.integers(1, MAX_OBSERVATIONS), after=st.integers(-1, 10**5))
def test_log_spacing_never_exceeds_its_count_and_reaches_the_end(total: int, count: int, after: int) -> None:
    last = after + total
    chooser = LogSpaced(count, last=last, after=after)
    stride = max(1, total // 5000)
    chosen = [step for step in range(after + 1, last + 1, stride) if chooser.wants(step)]
    assert 0 < len(chosen) <= count
    assert chosen[0] == after + 1
    if count >= 20:
        assert chosen[-1] - after > 0.5 * total  # the curve does not stop half-way


def test_every_step_of_a_short_run_is_chosen() -> None:
    chooser = LogSpaced(160, last=40, after=0)
    assert [step for step in range(1, 41) if chooser.wants(step)] == list(range(1, 41))


@pytest.mark.parametrize("total", [None, 100_000])
def test_a_long_run_gives_at_most_200_observations_spread_by_magnitude(
    tmp_path: Path, total: int | None
) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path, total_steps=total)
    steps: list[int] = []
    for begin in range(1, 100_001, 10_000):
        logged(path, range(begin, begin + 10_000))
        logged(path, range(begin + 9_999, begin + 10_000), **{"heldout_loss": 2.0})
        steps += steps_of(tail)
    assert 100 < len(steps) <= MAX_OBSERVATIONS
    assert steps[:5] == [1, 2, 3, 4, 5]
    per_decade = [sum(10**d <= step < 10 ** (d + 1) for step in steps) for d in (2, 3, 4)]
    assert min(per_decade) > 20
    assert max(per_decade) < 2 * min(per_decade)


def test_held_out_values_are_shown_although_training_steps_are_many(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path, total_steps=20_000)
    for begin in range(1, 20_001, 1_000):
        logged(path, range(begin, begin + 999))
        logged(path, range(begin + 999, begin + 1_000), **{"heldout_loss": 3.0})
    shown = [o for o in tail.observations(KEY) if "heldout_loss" in o.metadata]
    assert len(shown) == 20
    assert len(steps_of(tail)) == 0


def test_an_observation_carries_the_numbers_and_leaves_per_layer_values_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path, total_steps=10)
    record = {"step": 1, "train/loss": 2.5, "note": "text", "flag": True, "none": None}
    record |= {f"moe/router/layer_{n}/entropy": 1.0 for n in range(80)} | {"moe/router_agg/mean_entropy": 4.0}
    path.write_text(json.dumps(record) + "\n")
    (observation,) = tail.observations(KEY)
    assert observation.asset_key == KEY
    assert {name: value.value for name, value in observation.metadata.items()} == {
        "step": 1,
        "train/loss": 2.5,
        "moe/router_agg/mean_entropy": 4.0,
    }


def test_a_resumed_run_shows_only_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logged(path, range(1, 31))
    tail = MetricsTail(path, total_steps=60, after_step=20)
    assert steps_of(tail) == []
    logged(tmp_path / "new", range(1, 21))  # the trainer drops what lies past its checkpoint
    os.replace(tmp_path / "new", path)
    assert steps_of(tail) == []
    logged(path, range(21, 26))
    assert steps_of(tail) == [21, 22, 23, 24, 25]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path, total_steps=5)
    path.write_text('{"step": 1, "train/lo\n[1]\n{"train/loss": 1.0}\n{"step": 2, "train/loss": 1.0}\n')
    assert steps_of(tail) == [2]


def test_a_log_block_keeps_the_last_lines_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("old\n")
    tail = LogTail(path, most=3)
    with path.open("a") as file:
        file.write("a\nb\nc\nd\ne\nhalf")
    assert tail.block() == "… 2 lines are only in the file …\nc\nd\ne"
    assert tail.block() == ""


def test_what_is_shown_of_a_log_holds_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    path = tmp_path / "console.txt"
    path.write_text("")
    tail = LogTail(path)
    path.write_text("sent correct-horse to the server\n")
    assert tail.block() == last_lines(path, 5) == "sent [redacted] to the server"


def test_last_lines_of_a_missing_file_are_empty(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none", 5) == ""
    (tmp_path / "some").write_text("1\n2\n3\n")
    assert last_lines(tmp_path / "some", 2) == "2\n3"
