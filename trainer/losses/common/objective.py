"""The seam between a training run and what it minimises.

A recipe's `objective` names a module of `trainer.losses`, whose `OBJECTIVE` is a subclass of `Objective`. The
engine asks it, in this order, at every step:

    step = objective.start(batches, samples, group)         # all counts, before the first forward pass
    for batch in batches:
        loss = step.loss(model, hidden, batch)              # to be back-propagated; summed over all of them
    metrics = step.metrics()                                # reduced over ranks, with `loss`

so that a mean over the global batch is one, however the batch is cut into micro-batches and ranks. What a
loss needs beside tokens and labels rides in the batch, token by token: a teacher's log-probabilities, kept
ids, advantages. Samples made another way are a kind of their own, a `Part` of the mixture with its own spans.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.words import OBJECTIVES, require_word
from trainer.losses.common.mixture import Mixture
from trainer.losses.common.spans import Batch
from trainer.model.support_loss import Rule


class Head(Protocol):
    """What a loss asks of a model: its output head, by the loss of the model's backend."""

    def cross_entropy(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, select: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum and per-token losses; see `trainer.model.gpt.VPGPTModel.cross_entropy`."""
        ...

    def support_loss(
        self, hidden: Tensor, support: Tensor, rule: Rule, select: Tensor, highest: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum and per-token losses; see `trainer.model.gpt.VPGPTModel.support_loss`."""
        ...


class Step(Protocol):
    """One global batch on its way through the loss."""

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """Loss of a micro-batch, its share of the global batch's.

        Args:
            head: The model.
            hidden: `[S, B, H]`, final hidden states.
            batch: The micro-batch, fields `[B, S]`.

        Returns:
            A differentiable scalar; the objective is its sum over micro-batches and data-parallel ranks.
        """
        ...

    def metrics(self) -> dict[str, float | int]:
        """Close the batch; collective over the data-parallel ranks.

        Returns:
            `loss`, the objective, and for each of the objective's spans s `tokens/s`; and what else the
            objective logs.
        """
        ...


class Objective(ABC):
    """What a run minimises. One object a run.

    Attributes:
        mixture: Kinds of samples and their spans, for counting and for measuring held-out samples.
        absent: By span, in how many global batches it should have been and was not; kept over restarts.
    """

    mixture: Mixture
    absent: dict[str, int]

    @classmethod
    @abstractmethod
    def refuse(cls, recipe: TrainRecipe) -> None:
        """Refuse a recipe that this objective cannot follow, or that asks for what it would not use.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """

    @classmethod
    @abstractmethod
    def of(cls, recipe: TrainRecipe, kinds: Iterable[str]) -> Self:
        """Make the objective of a recipe.

        Args:
            recipe: One that `refuse` let pass.
            kinds: Kinds of samples that the run mixes, of `trainer.contract.kinds`.
        """

    @abstractmethod
    def start(
        self, batches: Sequence[Batch], samples: Mapping[str, int], group: dist.ProcessGroup | None
    ) -> Step:
        """Begin a global batch, before its first forward pass; collective over `group`.

        Args:
            batches: This rank's micro-batches.
            samples: Samples of each kind in the global batch.
            group: The data-parallel ranks.

        Raises:
            LossError: There is nothing to train on, or a batch lacks a field.
        """

    def use_store(self, manifest: Mapping[str, Any]) -> None:  # noqa: B027 - most need nothing of it
        """Take from the manifest of the run's top-K store what the objective needs, before the first step.

        Args:
            manifest: `store.json`.

        Raises:
            LossError: The store is not the one that the recipe asks for.
        """

    def token_losses(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each supervised token `[B, S]`, 0 elsewhere, for held-out samples.

        It is what runs of different objectives can be compared by.
        """
        mask = batch["loss_mask"]
        return head.cross_entropy(hidden, batch["labels"], torch.zeros_like(mask), mask > 0)[1]

    def token_measures(self, head: Head, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return all that is measured of held-out samples, each `[B, S]`, 0 where not supervised.

        Returns:
            `loss`, that of `token_losses`; `objective`, the token losses that `value` makes the objective of;
            and what else the objective knows of these samples.
        """
        losses = self.token_losses(head, hidden, batch)
        return {"loss": losses, "objective": losses}

    def value(self, means: Sequence[float], counts: Tensor, shares: Mapping[str, float]) -> float:
        """Return the objective of samples that were only measured, as if they were one global batch.

        Args:
            means: Mean `objective` of `token_measures` of each span of the mixture.
            counts: Tokens of each.
            shares: Share of each kind in the run's samples.
        """
        return self.mixture.value(means, counts, shares)

    @property
    def names(self) -> list[str]:
        """Names of the spans."""
        return self.mixture.spans.names


def load_objective(word: str) -> type[Objective]:
    """Import the objective that a recipe names.

    Raises:
        ConfigError: There is no such objective.
    """
    try:
        require_word(OBJECTIVES, word, "recipe.objective")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found: type[Objective] = import_module(f"{OBJECTIVES}.{word}").OBJECTIVE
    return found
