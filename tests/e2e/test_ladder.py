"""The command that `make ladder` runs, from nothing, then as a user starts it; then what a user looks at.

The experiment is `smoke` from a fresh student, so that the test takes minutes; `make ladder` runs the whole.
"""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.assets.graphs import NARROW
from tests.assets.repeating import repeat
from tests.forks import Forks
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.store import Store

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
VOCABULARY = 201_088


SHORT = {
    **NARROW,
    "rows = 2000\n\n": "rows = 60\n\n",
    "seq_len = 1024": "seq_len = 512",
    "extra_steps = 8": "extra_steps = 1",
    "max_tokens = 200000": "max_tokens = 40000",
    "[stages.vpmoe_stage1]\nsteps = 8": '[stages.vpmoe_stage1]\nsteps = 4\ninit = "fresh"',
    "model = { num_layers = 16, ffn": "model = { num_layers = 8, ffn",
    "global_batch_size = 2": "global_batch_size = 1",
    "eval_interval = 5": "eval_interval = 10",
    "max_per_task = 20": "max_per_task = 6",
    "ppl_tokens = 2000": "ppl_tokens = 300",
    "max_new_tokens = 48": "max_new_tokens = 8",
    "prompts = 4": "prompts = 1",
    "topk = 32": "topk = 4",
    "tail_draws = 8": "tail_draws = 2",
    "subset_fraction = 0.02": "subset_fraction = 0.2",
    "[stages.vpmoe_stage2]\nsteps = 6": "[stages.vpmoe_stage2]\nsteps = 2",
    "[stages.vpmoe_stage3]\nsteps = 4": "[stages.vpmoe_stage3]\nsteps = 2",
    "max_new_tokens = 64": "max_new_tokens = 8",
    "buffer_size = 16": "buffer_size = 4",
}
LEFT_OUT = re.compile(
    r"^\[(sources\.(qwen3_0_6b|gpt_oss_20b)|rungs\.\w+\.(surgery|healing)|rungs\.(qwen|vpdense)\w+(\.\w+)?)\].*\n"
    r"(?:(?!\[).*\n)*",
    re.M,
)
"""The rungs: nine jobs of the trainer, each of them tested in `tests/trainer/surgery` and `tests/assets`."""


def shortened() -> str:
    """The smoke experiment without rungs, its student from a seed, and with less to do at every step."""
    text = LEFT_OUT.sub("", (ROOT / "configs" / "smoke.toml").read_text())
    for old, new in SHORT.items():
        assert old in text, f"smoke.toml has no {old!r}"
        text = text.replace(old, new)
    return text


class Place:
    """A directory with a Dagster home and a store, and the commands run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        shutil.copy(ROOT / "dagster.yaml", directory)
        left_out = ("VPMOE_", "DAGSTER_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)} | {
            "DAGSTER_HOME": str(directory),
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "VPMOE_ARTIFACTS": str(directory / "artifacts"),
            "VPMOE_EXPERIMENT": str(directory / "short.toml"),
        }
        (directory / "short.toml").write_text(shortened())

    def run(self, program: str, *arguments: str) -> str:
        """Run an installed program; return all that it printed."""
        started = time.monotonic()
        done = subprocess.run(
            [BIN / program, *arguments],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(f"{program} {' '.join(arguments)}: {time.monotonic() - started:.1f} s")
        assert done.returncode == 0, done.stdout[-8000:]
        return done.stdout

    def ladder(self, forks: Forks | None = None) -> str:
        """Run the command of the Makefile: the installed program, or a fork, whose jobs start sooner."""
        (line,) = re.findall(r"^ladder:.*\n\t\$\(BIN\)/vpmoe (.*)$", (ROOT / "Makefile").read_text(), re.M)
        if forks is None:
            said = self.run("vpmoe", *shlex.split(line))
        else:
            arguments = ["-m", "vpmoe_assets.cli", *shlex.split(line)]
            done = forks.run(arguments, environment=self.environment, directory=self.directory)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            said = done.stdout
        (log,) = re.findall(r"^log: (.*)$", said, re.M)
        return said + Path(log).read_text()

    def vpmoe(self, *arguments: str):
        return json.loads(self.run("vpmoe", *arguments, "--json"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_ladder_from_nothing_then_again_then_what_users_ask(
    tmp_path, tmp_path_factory, monkeypatch, forks
):
    place = Place(tmp_path)
    monkeypatch.setenv("VPMOE_EXPERIMENT", place.environment["VPMOE_EXPERIMENT"])
    assets = {
        spec.key.path[-1]
        for spec in runpy.run_module("vpmoe_assets.definitions")["defs"].resolve_all_asset_specs()
    }
    made = assets - {"lineage_index", "records"}  # which stands for what the others wrote

    first = place.ladder(forks)
    listed = place.vpmoe("ls")
    assert listed["unreadable"] == {}
    artifacts = {row["asset"]: row for row in listed["artifacts"]}
    assert set(artifacts) == made
    assert {row["state"] for row in artifacts.values()} == {"fresh"}

    stage = place.vpmoe("show", "vpmoe_stage1")
    record = stage["record"]
    metrics = record["metrics"]
    assert metrics["valid_loss"] < min(math.log(VOCABULARY), metrics["valid_loss_start"])
    assert metrics["resume_drift"] == 0.0
    assert {node["asset"] for node in stage["ancestry"]} >= {"synth_kd_v1", "synth_harmony", "synth"}
    assert all(node["present"] for node in stage["ancestry"])
    assert "ancestry" in place.run("vpmoe", "show", "vpmoe_stage1")
    assert (Path(place.vpmoe("path", "vpmoe_stage1")["path"]) / "config.json").is_file()

    again = place.ladder()
    for asset in made:
        assert f"{asset}: reused {artifacts[asset]['version']}" in again
        assert f"{asset}: reused " not in first
    assert place.vpmoe("ls") == listed

    store = Store(tmp_path / "artifacts")
    record = store.find("smoke", "synth_kd_v1")
    repeated = repeat(record, ObjectStore(store.root), store, tmp_path_factory.mktemp("repeated"), forks)
    assert (repeated.fingerprint, repeated.digest) == (record.fingerprint, record.digest)

    assert place.vpmoe("verify") == {"artifacts": len(made), "problems": [], "notes": []}
    ladder = place.vpmoe("sql", "SELECT * FROM ladder")
    assert {row["asset"]: row["valid_loss"] for row in ladder}["vpmoe_stage1"] == metrics["valid_loss"]
    curve = place.vpmoe("sql", "SELECT count(*) AS points FROM metric_points WHERE asset = 'vpmoe_stage1'")
    assert curve[0]["points"] >= metrics["steps"]
    tables = "SELECT count(*) AS n, sum(hash(COLUMNS(*)::VARCHAR)) FROM artifacts"
    before = place.vpmoe("sql", tables)
    rebuilt = place.vpmoe("index", "rebuild")
    assert (rebuilt["artifacts"], rebuilt["unreadable"]) == (len(made), {})
    assert place.vpmoe("sql", tables) == before

    files = [path for path in store.root.glob("smoke/*/*/**/*") if path.is_file()]
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {path for path, mode in modes.items() if mode != 0o444 & ~umask} == set(), (
        "readable as the umask says"
    )

    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        ".dagster",
        "artifacts",
        "dagster.yaml",
        "short.toml",
    ], "nothing is written outside Dagster's folder and the store"
