"""Samples that a run makes while it trains: a kind of its mixture that no data set holds, such as rollouts.

The engine asks such a source, in this order, at every step:

    source.prepare(step, model)               # with the weights after step - 1
    source.take(count)                        # places of the step's samples of this kind
    source.sample(epoch, number)              # those of them that are this rank's
    source.metrics()                          # logged with the step

and at every save for its place (`state_dict`, JSON values) and for what else it holds (`save`, files of the
checkpoint, which have checksums as all others). A source that was put back by `load_state_dict` and `load`
goes on as if nothing had happened; so every engine has sources of its own, the resume check's too.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from trainer.data.kd import Sample
from trainer.data.sampler import Walk
from trainer.job.metrics import Value


class LiveSource(Walk):
    """One kind's samples, made while the run goes on. Every rank calls the same methods in the same order."""

    @abstractmethod
    def prepare(self, step: int, model: nn.Module) -> None:
        """Make ready what a step draws from. Collective.

        Args:
            step: Its 1-based number.
            model: With the weights after the step before; may be left in evaluation mode.
        """

    @abstractmethod
    def sample(self, epoch: int, number: int) -> Sample:
        """Return a sample that was taken for the present step: tensors of shape [S] or [S, ...]."""

    @abstractmethod
    def describe(self, epoch: int, number: int) -> str:
        """Name a sample and what is in it, for a person."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Value]:
        """Return what is logged with the present step, the same on every rank."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write what is no JSON value into a directory of a checkpoint: every rank its own files, synced.

        Args:
            directory: The source's own.
        """

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Take back what `save` wrote, after `load_state_dict`; its checksums were verified."""

    @abstractmethod
    def close(self) -> None:
        """Let go of threads and files."""
