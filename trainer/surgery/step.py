"""What a conversion step is given and what it gives back."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from trainer.contract.schema.job import Job
from trainer.contract.schema.rungs.rung import ConversionRecipe
from trainer.job.lifecycle import Interrupted
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir

LOG_SECONDS = 10.0
"""Least time between two progress lines where there is no terminal."""

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        passed: Whether what was converted is as it should be.
        description: What was checked, for people.
        metadata: The measured values, JSON-able.
    """

    passed: bool
    description: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a step has to say of its result.

    Attributes:
        transform: The method, indices, hashes: what of it is not in the recipe.
        checks: By name.
        layers: The per-layer table of the report; rows with equal keys, values numbers, strings or None.
        details: What else belongs into the record.
    """

    transform: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Verdict] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """One conversion under way.

    Attributes:
        job: The job.
        recipe: Its recipe, checked.
        inputs: Payload directory of every input, by name.
        scratch: Empty directory for intermediate files, removed at the end.
        work: The job's work directory, for the heartbeat.
        stop: Set when the job was asked to stop.
    """

    job: Job
    recipe: ConversionRecipe
    inputs: Mapping[str, Path]
    scratch: Path
    work: WorkDir
    stop: StopRequest

    @property
    def seed(self) -> int:
        """The experiment's seed."""
        return self.job.seed

    @property
    def source(self) -> Path:
        """Payload of the checkpoint that is converted."""
        return self.inputs[self.recipe.source]

    @property
    def device(self) -> torch.device:
        """Where heavy arithmetic may run; weights are read and written on the CPU."""
        return torch.device(self.job.execution.device)

    def generator(self, *names: object) -> torch.Generator:
        """Return the CPU generator of these names: independent of all others and of the order of asking.

        Args:
            *names: What is drawn, for instance step, layer number, expert, tensor.
        """
        text = ":".join(str(part) for part in (self.seed, *names))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def check_stop(self) -> None:
        """Leave when the job was asked to stop; call it between pieces of work.

        Raises:
            Interrupted: It was.
        """
        if self.stop:
            raise Interrupted(
                f"stopped by {self.stop.received}; nothing was delivered, the same job starts over"
            )

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "tensor") -> Iterator[Tick]:
        """Show the progress of a piece of work: a bar on a terminal, a line now and then elsewhere.

        Args:
            name: What is done.
            total: How many ticks it takes.
            unit: Of a tick.

        Yields:
            A function to call after each piece, with its name; it raises `Interrupted` on a stop.
        """
        began = logged = time.monotonic()
        done = 0
        self.work.at(name, 0)
        terminal = sys.stderr.isatty()
        with tqdm(total=total, desc=name, unit=unit, disable=not terminal, leave=False) as bar:

            def tick(label: str) -> None:
                nonlocal done, logged
                done += 1
                self.work.at(name, done)
                bar.update()
                bar.set_postfix_str(label, refresh=False)
                if not terminal and time.monotonic() - logged >= LOG_SECONDS:
                    logged = time.monotonic()
                    LOGGER.info("%s: %d of %d %ss (%s)", name, done, total, unit, label)
                self.check_stop()

            self.check_stop()
            yield tick
        LOGGER.info("%s: %d %ss in %.1f s", name, done, unit, time.monotonic() - began)


class Step(Protocol):
    """A step's module, `trainer.surgery.<step>`: two functions; its docstring is what `convert --help` says.

    `convert` fills the result. Its second argument is a `trainer.surgery.weights.WeightsWriter` for
    a Megatron rung, which it fills completely (the caller finishes it), and the empty payload directory
    (`pathlib.Path`) for a Hugging Face rung.

    `check` runs after everything written was read back and found equal; it measures the function of the
    result (`payload`) against its source and adds to `outcome`. A failed expectation is a failed
    `Verdict`; only what makes the result unusable raises.
    """

    def convert(self, conversion: Conversion, out: Any) -> Outcome:
        """Fill the result."""

    def check(self, conversion: Conversion, payload: Path, outcome: Outcome) -> None:
        """Measure it."""
