"""Small experiments and their graphs, run in this process with a store of their own."""

import os
import runpy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.events import DagsterEvent
from dagster._core.loader import LoadingContextForTest

from vpmoe_assets.codebase.tree import MEMORY, PACKAGES, SourceTree, replace_current
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources import launcher
from vpmoe_assets.resources.trainer import TrainerResource

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"

SMALL = {
    'name = "smoke"': 'name = "tiny"',
    "rows = 2000\n\n": "rows = 60\n\n",
    "num_shards = 4": "num_shards = 2",
    "max_tokens = 200000": "max_tokens = 5000",
    "subset_fraction = 0.02": "subset_fraction = 0.2",
    "[stages.vpmoe_stage1]\nsteps = 8": '[stages.vpmoe_stage1]\nsteps = 10\ninit = "fresh"',
}
NARROW = {
    "hidden_size = 64\nnum_attention_heads = 4": "hidden_size = 16\nnum_attention_heads = 4",
    "num_query_groups = 2\nhead_dim = 16": "num_query_groups = 2\nhead_dim = 4",
}
"""Models a quarter as wide: what there is for each of the 201,088 words is most of what is trained."""
NARROW_DONORS = {
    **NARROW,
    "num_layers = 8\nhidden_size = 64": "num_layers = 8\nhidden_size = 16",
    "num_key_value_heads = 4\nhead_dim = 16": "num_key_value_heads = 4\nhead_dim = 4",
    "hidden_size = 64\nvocab_size": "hidden_size = 16\nvocab_size",
}
SHALLOW = {
    **NARROW_DONORS,
    "seq_len = 1024\n": "seq_len = 256\n",
    "block = 1024\n": "block = 256\n",
    "global_batch_size = 2\n": "global_batch_size = 1\n",
    "num_layers = 8\nhidden_size = 64": "num_layers = 4\nhidden_size = 16",
    "model = { num_layers = 8, softmax_type": "model = { num_layers = 4, softmax_type",
    "model = { num_layers = 8 }": "model = { num_layers = 4 }",
    "model = { num_layers = 16 }": "model = { num_layers = 8 }",
    "model = { num_layers = 16, ffn": "model = { num_layers = 8, ffn",
}
"""Half the layers, a quarter of the width and of the sequences, to train such an experiment for real."""
DATA = ("o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1", "healing_corpus", "healing_text_v1")
"""The assets of a dataset, in an order in which they can be made."""


def write_experiment(path: Path, changes: Mapping[str, str] | None = None) -> Path:
    """Write the smoke experiment with few rows, and with each text of ``changes`` in place of another."""
    text = (ROOT / "configs" / "smoke.toml").read_text()
    for old, new in {**SMALL, **(changes or {})}.items():
        assert text.count(old) == 1, f"smoke.toml has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    path.write_text(text)
    return path


def rows_from(folder: Path) -> dict[str, str]:
    """Changes of the experiment by which its rows come from parquet files in a folder."""
    old = "rows = 2000\n\n"
    return {old: old, 'kind = "generated"\nrows = 2000': f'kind = "parquet"\npath = "{folder}"'}


@dataclass
class Graph:
    """A code location as it loads under one experiment, and where it puts things.

    Attributes:
        experiment: a name, or the path of a TOML file.
        root: of the store.
        instance: Dagster's.
        resources: in place of the location's own.
    """

    experiment: str | Path
    root: Path
    instance: dg.DagsterInstance = field(default_factory=dg.DagsterInstance.ephemeral)
    resources: Mapping[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return Store(self.root)

    @property
    def index(self) -> Index:
        return Index(self.root / "index.duckdb")

    def definitions(self) -> dg.Definitions:
        """Load the code location anew, as a fresh process would."""
        with self.environment():
            return runpy.run_module("vpmoe_assets.definitions")["defs"]

    @contextmanager
    def environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VPMOE_EXPERIMENT", str(self.experiment))
            patch.setenv("VPMOE_ARTIFACTS", str(self.root))
            patch.setenv("VPMOE_WORKERS", os.environ.get("VPMOE_WORKERS", "1"))
            patch.setenv("VPMOE_LEASE_DIR", str(self.root / "leases"))
            yield

    def run(self, *assets: str) -> "Run":
        """Materialise assets by their bare names; one that fails makes a failed run, not an exception."""
        definitions = self.definitions()
        made = [asset for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition)]
        names = {key.path[-1]: key for asset in made for key in asset.keys}
        with self.environment():
            result = dg.materialize(
                made,
                selection=[names[asset] for asset in assets],
                resources={**(definitions.resources or {}), **self.resources},
                instance=self.instance,
                raise_on_error=False,
            )
        return Run(result.run_id, self.instance)

    def make(self, *assets: str) -> "Run":
        """Materialise assets, all of them with success."""
        run = self.run(*assets)
        assert run.success, run.error()
        return run

    def stale(self, asset: str) -> list[str]:
        """Say why Dagster would show an asset as out of date; nothing where it would not."""
        key = dg.AssetKey(["tiny", asset])
        graph = self.definitions().get_repository_def().asset_graph
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        return [cause.reason for cause in resolver.get_stale_causes(key)]

    def latest(self, asset: str) -> Record:
        """Return the latest record of an asset of the only experiment in the store, or of ``tiny``."""
        record = self.store.find("tiny", asset)
        assert record is not None, f"{asset} was not published"
        return record


@dataclass(frozen=True)
class Run:
    """What came of one Dagster run, by bare asset names, as the instance has it."""

    id: str
    instance: dg.DagsterInstance

    @cached_property
    def success(self) -> bool:
        run = self.instance.get_run_by_id(self.id)
        assert run is not None
        return run.is_success

    @cached_property
    def events(self) -> Sequence[DagsterEvent]:
        return [entry.dagster_event for entry in self.instance.all_logs(self.id) if entry.dagster_event]

    @property
    def materializations(self) -> Sequence[dg.AssetMaterialization]:
        return [
            event.step_materialization_data.materialization
            for event in self.events
            if event.is_step_materialization
        ]

    @property
    def started(self) -> list[str]:
        """Assets whose step ran, in order."""
        return [
            event.step_key.rpartition("__")[2]
            for event in self.events
            if event.is_step_start and event.step_key
        ]

    def metadata(self, asset: str) -> dict[str, Any]:
        """Values of the materialisation of an asset."""
        (found,) = [
            materialization
            for materialization in self.materializations
            if materialization.asset_key.path[-1] == asset
        ]
        return {name: value.value for name, value in found.metadata.items()}

    def made(self) -> list[str]:
        """Assets that were materialised, reused or not, in order."""
        names = [materialization.asset_key.path[-1] for materialization in self.materializations]
        return [name for name in names if name != "records"]  # which stands for what the others wrote

    def reused(self, *assets: str) -> dict[str, bool]:
        """Say for each asset whether it had been made before."""
        return {asset: self.metadata(asset)["reused"] for asset in assets or self.made()}

    def checks(self, asset: str) -> dict[str, dg.AssetCheckEvaluation]:
        return {
            evaluation.check_name: evaluation
            for event in self.events
            if event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION
            and (evaluation := event.asset_check_evaluation_data).asset_key.path[-1] == asset
        }

    def log(self) -> str:
        """What the assets said, one message a line."""
        return "\n".join(
            entry.user_message for entry in self.instance.all_logs(self.id) if not entry.dagster_event
        )

    def error(self, asset: str | None = None) -> str:
        """The innermost message of a failed step: what the user has to act on."""
        failures = [
            event
            for event in self.events
            if event.is_step_failure and (asset is None or (event.step_key or "").endswith(f"__{asset}"))
        ]
        if not failures:
            return ""
        data = failures[0].step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            return data.user_failure_data.description
        error = data.error
        while error is not None and error.cause is not None:
            error = error.cause
        return error.message if error else ""


@dataclass(frozen=True)
class ProjectCopy:
    """A copy of the sources, which stands for the project in this process."""

    root: Path
    memory: Path

    @classmethod
    def make(cls, directory: Path) -> "ProjectCopy":
        """Copy the sources, and what was found out about them, so that only edits have to be parsed.

        Args:
            directory: Where to.
        """
        root = directory / "project"
        for package in PACKAGES:
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
        copy = cls(root, Path(shutil.copyfile(MEMORY, directory / "codebase.json")))
        copy.read_again()
        return copy

    def read_again(self) -> None:
        """Take note of edits, as a new process would."""
        replace_current(SourceTree(self.root, memory=self.memory))


def copy_store(source: Path, target: Path) -> Path:
    """Copy a store with everything in it; published files stay read-only."""
    return Path(shutil.copytree(source, target, symlinks=True))


def stand_in_trainer(monkeypatch: pytest.MonkeyPatch, program: str, **settings: Any) -> TrainerResource:
    """A resource whose jobs are run by a program of ``programs/`` in place of the trainer."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setattr(launcher, "PROGRAM", program)
    return TrainerResource(**{"poll_s": 0.05, "grace_s": 20.0, "wandb": "disabled", **settings})


def payload_bytes(directory: Path, suffixes: Sequence[str] = ("",)) -> dict[str, bytes]:
    """Contents of the files below a directory whose names end so, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name.endswith(tuple(suffixes))
    }
