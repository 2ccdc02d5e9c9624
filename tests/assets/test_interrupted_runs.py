"""A run that dies in the middle leaves nothing for others to see, and the next run goes on where it was."""

import os
import signal

import pytest

from tests.assets.graphs import ROOT, payload_bytes
from tests.assets.test_distillation import OURS, SERVED
from vpmoe_assets.assets.making import Making
from vpmoe_assets.checks import data
from vpmoe_assets.checks.check import check
from vpmoe_assets.harmony import build
from vpmoe_assets.lineage.verify import verify_record
from vpmoe_assets.verdict import Verdict

pytestmark = pytest.mark.slow

CHAIN = ("o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1")


def kd_bytes(graph) -> dict[str, bytes]:
    return payload_bytes(graph.store.payload(graph.latest("synth_kd_v1")))


def test_a_build_that_fails_after_its_shards_goes_on_from_them(graph, tiny_made, monkeypatch):
    whole, calls = build.require_unique_ids, []

    def fails_once(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        whole(*arguments)

    monkeypatch.setattr(build, "require_unique_ids", fails_once)
    mine = graph()
    failed = mine.run(*CHAIN)
    assert "No space left on device" in failed.error("synth_kd_v1")
    assert mine.store.versions("tiny", "synth_kd_v1") == []
    assert mine.index.query("SELECT asset FROM artifacts WHERE asset = 'synth_kd_v1'").rows == []
    again = mine.make(*CHAIN)
    assert again.reused() == {**dict.fromkeys(CHAIN, True), "synth_kd_v1": False}
    assert "2 shards were finished by an interrupted build" in again.log()
    assert kd_bytes(mine) == kd_bytes(tiny_made[0])


def test_half_a_file_that_a_killed_process_left_is_not_published(graph, tiny_made, tmp_path, monkeypatch):
    whole = Making.build

    def build_after_a_kill(*arguments):
        begun = whole(*arguments)
        (begun.payload / ".half-written.4711").write_bytes(b"half")
        return begun

    @check("said_nothing")
    def quick(item, inputs) -> Verdict:
        """It is there."""
        return Verdict.of([], "", {})

    monkeypatch.setattr(Making, "build", build_after_a_kill)
    monkeypatch.setattr(data, "tokenizer_agrees", quick)
    served = graph({OURS: SERVED, "tail_draws = 8\n": ""}, root=tmp_path / "empty")
    served.make("o200k_tokenizer", "teacher")
    assert [entry.path for entry in served.latest("teacher").files] == ["teacher.json"]
    tokenizer = served.latest("o200k_tokenizer")
    assert tokenizer.digest == tiny_made[0].latest("o200k_tokenizer").digest


PROGRAM = """
import os, signal, sys
from pathlib import Path
from tests.assets.graphs import Graph
from vpmoe_assets.lineage import placing

where, experiment, root = sys.argv[1:]
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "before it is visible":
    whole = placing.Places._move
    def dies(self, work, source, target):
        if target.parent.name == "synth_harmony":
            die()
        whole(self, work, source, target)
    placing.Places._move = dies
else:
    from vpmoe_assets.harmony import audit
    audit.harmony_manifest_matches = die
Graph(Path(experiment), Path(root)).run("synth", "synth_harmony")
"""


@pytest.mark.parametrize("where", ["while it is checked", "before it is visible"])
def test_what_a_killed_orchestrator_had_made_is_published_once_and_judged_by_the_next_run(
    graph, tiny_made, forks, where
):
    mine = graph()
    killed = forks.run(
        ["-c", PROGRAM, where, str(mine.experiment), str(mine.root)],
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
        directory=mine.root,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    directory = mine.root / "tiny" / "synth_harmony"
    assert bool(mine.store.versions("tiny", "synth_harmony")) == (where == "while it is checked")
    run = mine.make("synth", "synth_harmony")
    assert run.reused() == {"synth": True, "synth_harmony": True}, (
        "the publication was past its point of no return"
    )
    assert run.checks("synth_harmony")["manifest_matches_shards"].passed
    record = mine.latest("synth_harmony")
    assert (record.sequence, record.digest) == (1, tiny_made[0].latest("synth_harmony").digest)
    assert verify_record(mine.store, record) == []
    assert [path.name for path in directory.iterdir()] == [record.version]
