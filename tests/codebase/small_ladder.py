"""A small ladder, each asset made in a process of its own, with what that process was seen to load."""

import json
import os
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.assets.graphs import SHALLOW, write_experiment
from tests.forks import Forks
from trainer.contract.status import MODULES_NAME
from vpmoe_assets.assets.step import Step
from vpmoe_assets.codebase.bystanders import bystander
from vpmoe_assets.codebase.closure import with_parents
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

WHOLE = bool(os.environ.get("VPMOE_TEST_WHOLE_LADDER"))
"""Whether every rung is made: it takes five minutes more than a run of all tests has."""
WITNESS = Path(__file__).with_name("programs") / "witness"
EXPERIMENT = {
    **SHALLOW,
    "rows = 2000\n\n": "rows = 40\n\n",
    "max_tokens = 200000": "max_tokens = 30000",
    "max_per_task = 20": "max_per_task = 12",
    "[rungs.vpdense0_5_28.healing]\nsteps = 4\nlearning_rate = 1e-3\n": "",
    "[rungs.vpdense_28.healing]\nsteps = 4\nlearning_rate = 1e-3\n": "",
    "als_sweeps = 200": "als_sweeps = 3",
    "[stages.vpmoe_stage1]\nsteps = 8": "[stages.vpmoe_stage1]\nsteps = 2"
    + ("" if WHOLE else '\ninit = "fresh"'),
    "extra_steps = 8": "extra_steps = 1",
    "subset_fraction = 0.02": "subset_fraction = 1.0",
    "topk = 32": "topk = 4",
    "[stages.vpmoe_stage2]\nsteps = 6": "[stages.vpmoe_stage2]\nsteps = 2",
    "[stages.vpmoe_stage3]\nsteps = 4": "[stages.vpmoe_stage3]\nsteps = 2",
    "max_new_tokens = 64": "max_new_tokens = 8",
    "buffer_size = 16": "buffer_size = 4",
    "ppl_tokens = 2000": "ppl_tokens = 200",
    "prompts = 4, max_new_tokens = 48, greedy = true": "prompts = 1, max_new_tokens = 4, greedy = false",
}
"""One healing run, all stages, all conversions; few rows, few steps, few layers, short sequences."""
EVERY = (
    "o200k_tokenizer",
    "synth",
    "healing_corpus",
    "core8_bundle",
    "qwen3_0_6b",
    "gpt_oss_20b",
    "synth_harmony",
    "synth_kd_v1",
    "healing_text_v1",
    "qwen3_0_6b_o200k",
    "vpdense0_5_28",
    "vpdense_28",
    "vpdense_80",
    "vpdense_80_healed",
    "vpmoe",
    "vpmoe_stage1",
    "teacher",
    "teacher_topk",
    "vpmoe_stage2",
    "vpmoe_stage3",
    "eval_vpmoe_stage1",
    "ladder_report",
)
"""In an order in which they can be made."""
LONG = (
    *("vpdense_28", "vpdense_80", "vpdense_80_healed", "vpmoe"),
    *("teacher", "teacher_topk", "vpmoe_stage2", "vpmoe_stage3"),
)
ASSETS = tuple(asset for asset in EVERY if WHOLE or asset not in LONG)
_MAKE = """
import sys
import dagster as dg
from vpmoe_assets.definitions import defs, experiment
from vpmoe_assets.resources.trainer import TrainerResource

made = [asset for asset in defs.assets if isinstance(asset, dg.AssetsDefinition)]
resources = {**defs.resources, "trainer": TrainerResource(wandb="disabled", poll_s=0.1)}
dg.materialize(made, selection=[dg.AssetKey([experiment.name, sys.argv[1]])], resources=resources)
"""


@dataclass(frozen=True)
class Seen:
    """What was seen of the making of an asset.

    Attributes:
        loaded: Modules that the process which made its bytes had loaded when they were there.
        imports: Which module was seen to import which, in all processes of the making.
    """

    loaded: frozenset[str]
    imports: frozenset[tuple[str, str]]

    def ran(self, beside: set[str]) -> set[str]:
        """Return the modules that took part in making the bytes.

        These are what was loaded and does not stand by, all that those were seen to import, and so on; up to
        the bystanders.

        Args:
            beside: Modules that may be loaded beside any step.
        """
        found: set[str] = set()
        waiting = [name for name in self.loaded if name not in beside]
        while waiting:
            name = waiting.pop()
            if name not in found and bystander(name) is None:
                found.add(name)
                waiting += with_parents([name, *(other for by, other in self.imports if by == name)])
        return found


def make(directory: Path, forks: Forks, assets: Sequence[str] = ASSETS) -> dict[str, Seen]:
    """Make the ladder's assets, one process after another: each has loaded nothing of this project before."""
    experiment = write_experiment(directory / "tiny.toml", {**EXPERIMENT})
    store = Store(directory / "artifacts")
    seen = {}
    for asset in assets:
        notes = directory / "notes" / asset
        notes.mkdir(parents=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(WITNESS)]),
            "VPMOE_TEST_WITNESS": str(notes),
            "VPMOE_EXPERIMENT": str(experiment),
            "VPMOE_ARTIFACTS": str(store.root),
            "VPMOE_LEASE_DIR": str(directory / "leases"),
            "VPMOE_WORKERS": "1",
        }
        done = forks.run(["-c", _MAKE, asset], environment=environment, directory=directory)
        record = store.find("tiny", asset)
        assert done.returncode == 0, f"{asset}: {done.stderr[-3000:]}"
        assert record is not None, asset
        loaded = json.loads((store.directory(record) / "run" / MODULES_NAME).read_bytes())
        imports = {(by, name) for file in notes.iterdir() for by, name in json.loads(file.read_bytes())}
        seen[asset] = Seen(frozenset(loaded), frozenset(imports))
    return seen


def steps_of(directory: Path) -> Mapping[str, Step]:
    """Return the steps of the ladder's experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPMOE_EXPERIMENT", str(directory / "tiny.toml"))
        patch.setenv("VPMOE_ARTIFACTS", str(directory / "artifacts"))
        steps: Mapping[str, Step] = runpy.run_module("vpmoe_assets.definitions")["steps"]
    return steps
