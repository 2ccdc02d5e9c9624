"""What a suite of measurements is given and gives back, and where to find each suite."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from tqdm import tqdm

from trainer.contract.canonical import canonical_json
from trainer.contract.files import replace_text
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.evaluate.models import LanguageModel
from trainer.job.lifecycle import Interrupted
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER

SUITES: Mapping[str, str] = {
    "core8": "trainer.evaluate.core8",
    "ppl": "trainer.evaluate.ppl",
    "numeric": "trainer.evaluate.numeric",
    "harmony": "trainer.evaluate.harmony",
    "router": "trainer.evaluate.router_health",
}
"""Module of each suite; it has a function `run` (see `Suite`). `router` is asked of MoE checkpoints only."""


@dataclass(frozen=True)
class SuiteResult:
    """What one suite found out about one checkpoint.

    Everything in it goes into the artifact's hashed payload: no time, host, path or duration.

    Attributes:
        metrics: Flat names (`core8/arc_easy/acc`) and finite numbers, for records, tables and plots.
        report: The suite's part of the report: JSON values.
        items: One JSON object per example, for paired comparisons; empty where there are no examples.
    """

    metrics: Mapping[str, int | float]
    report: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Batching:
    """How much is computed at once: changes speed and memory, and results by no more than round-off.

    Attributes:
        rows: Most rows of a batch.
        tokens: Most positions of a batch, padding included; a single longer row is a batch of its own.
    """

    rows: int
    tokens: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise ValueError(f"a batch of {self.rows} rows and {self.tokens} tokens: both must be at least 1")

    @classmethod
    def default(cls, device: str) -> "Batching":
        """Return what suits a device."""
        return cls(rows=512, tokens=1 << 16) if device == "cuda" else cls(rows=32, tokens=1 << 13)


@dataclass(frozen=True)
class SuiteContext:
    """What a suite works with besides model and recipe.

    Attributes:
        object: Name of the checkpoint under measurement.
        inputs: Payload directory of every input of the job, by name.
        digests: Content digest of every input.
        seed: The experiment's seed.
        state: Directory of this object's finished tasks; survives a crash.
        stop: Asks for a clean stop.
        batching: Sizes of batches.
        beat: Told what is going on, for the heartbeat.
    """

    object: str
    inputs: Mapping[str, Path]
    digests: Mapping[str, str]
    seed: int
    state: Path
    stop: StopRequest
    batching: Batching
    beat: Callable[[str], None] = field(default=lambda _: None)

    def input(self, name: str, purpose: str) -> Path:
        """Payload directory of an input that a suite cannot do without.

        Raises:
            ConfigError: The job lacks it.
        """
        if name not in self.inputs:
            raise ConfigError(
                f"inputs: {name} is missing; {purpose} needs it, found {', '.join(self.inputs) or 'none'}"
            )
        return self.inputs[name]

    def check_stop(self) -> None:
        """To be called between batches.

        Raises:
            Interrupted: A stop was asked for; finished tasks are kept.
        """
        if self.stop:
            raise Interrupted(
                f"stopped by {self.stop.received}; start the same job again to go on with the next task"
            )

    def progress(self, total: int, label: str, unit: str = "row") -> "tqdm[Any]":
        """Return a bar on a terminal, silent elsewhere."""
        return tqdm(
            total=total,
            desc=f"{self.object} {label}",
            unit=unit,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def once(
        self, task: str, identity: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the result of a task, computed unless an earlier start of this job finished it.

        Args:
            task: Name, unique among the job's tasks of this object (`core8/arc_easy`).
            identity: Everything that decides the result, as JSON values; a stored result of another identity
                is computed again.
            compute: Makes the result, JSON values.
        """
        self.check_stop()
        self.beat(task)
        text = canonical_json({"object": self.object, "task": task, **identity})
        key = hashlib.sha256(text.encode()).hexdigest()
        path = self.state / f"{task.replace('/', '.')}.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get("key") == key:
                LOGGER.info("%s %s: taken from an earlier start of this job", self.object, task)
                return cast("dict[str, Any]", stored["result"])
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, canonical_json({"key": key, "result": result}) + "\n")
        return cast("dict[str, Any]", json.loads(canonical_json(result)))


class Suite(Protocol):
    """The function `run` of a suite's module."""

    def __call__(self, model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> SuiteResult:
        """Measure one checkpoint.

        Raises:
            TokenizerMismatchError: The measurement makes no sense with this checkpoint's tokenizer; the
                report then says so in the suite's place.
            Interrupted: A stop was asked for.
        """


def find_suite(name: str) -> Suite:
    """Return the `run` function of a suite."""
    return cast(Suite, importlib.import_module(SUITES[name]).run)
