"""What a backend is: the parts of a model that may be computed in more than one way.

`trainer/model/backends/<word>.py` holds one `BACKEND`, its `FUSIONS` and what it `KEEPS`. Parameters, their
names, shapes and initial values are the same whatever the backend, so any published checkpoint and any resume
checkpoint loads under any of them. A backend either runs what is asked or raises `ConfigError` when its parts
are built, naming the key, the value and the remedy.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from trainer.contract.schema.base import ConfigError
from trainer.contract.words import BACKENDS, require_word
from trainer.model.config import VPTransformerConfig
from trainer.model.fusing import Fuse, unfused
from trainer.model.router import Linear, Route, linear_in, route_and_balance
from trainer.model.support_loss import Rule


class CoreAttentionFactory(Protocol):
    """Makes the core attention of one layer, a `trainer.model.context.CachingCoreAttention`.

    Its one parameter, where `config.softmax_type` is `learnable`, is `softmax_offset` `[heads / tp]`.
    """

    def __call__(
        self, *, config: VPTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> nn.Module:
        """Build layer `layer_number` (from 1)."""
        ...


class ExpertsFactory(Protocol):
    """Makes the routed experts of one layer; parameters and calls are those of `StackedExperts`."""

    def __call__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection) -> nn.Module:
        """Build this rank's experts."""
        ...


class HeadLoss(Protocol):
    """Cross-entropy of hidden states through the output head, without keeping the logits."""

    def __call__(
        self,
        hidden: torch.Tensor,
        head_weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        *,
        select: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum and per-token losses; see `trainer.model.cross_entropy.chunked_cross_entropy`."""
        ...


class SupportLoss(Protocol):
    """A loss of a few log-probabilities of each token, through the output head."""

    def __call__(
        self,
        hidden: torch.Tensor,
        head_weight: torch.Tensor,
        support: torch.Tensor,
        rule: Rule,
        *,
        select: torch.Tensor,
        highest: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and per-token losses; see `trainer.model.support_loss.chunked_support_loss`."""
        ...


@dataclass(frozen=True)
class Backend:
    """How the parts of a model that have more than one way are computed.

    Every parameter gets a gradient in every step, if only zeros, through autograd; a kernel that adds it to
    `main_grad` itself says so with `trainer.model.parameters.mark_written`.

    Attributes:
        core_attention: Scores, mask, softmax with a sink, weighted sum of values.
        experts: The routed experts, given tokens, weights and choices.
        loss: The output head and the cross-entropy in one.
        support_loss: The output head and a loss of a few of its log-probabilities in one.
        router_linear: The product that makes a router's logits.
        route: What a router does with them.
        fuse: Makes one function of a chain of small operations of a training pass.
        in_line: A pass without a cache runs its rows one after another as `[B · S, 1, H]`, so that nothing is
            put into another order for attention; what is per row asks the padding mask for the rows.
        capturable: Between embedding and final norm, forward and backward ask nothing of the device, so a
            CUDA graph can hold them.
        slots: Sequences are decoded in static slots, `trainer.decoding.slots`.
        optimizer_kernels: The optimizer updates by its kernels, which keep the low halves of master weights.
    """

    core_attention: CoreAttentionFactory
    experts: ExpertsFactory
    loss: HeadLoss
    support_loss: SupportLoss
    router_linear: Linear = linear_in
    route: Route = route_and_balance
    fuse: Fuse = unfused
    in_line: bool = False
    capturable: bool = False
    slots: bool = False
    optimizer_kernels: bool = False


def load_backend(word: str) -> Backend:
    """Import the backend that a recipe names.

    Args:
        word: `training.backend`.

    Raises:
        ConfigError: There is no such backend, or its module cannot be imported here.
    """
    try:
        require_word(BACKENDS, word, "training.backend")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        backend: Backend = import_module(f"{BACKENDS}.{word}").BACKEND
    except ImportError as error:
        raise ConfigError(
            f"training.backend = {word!r}: not available in this installation ({error}); install what it "
            "needs, or set training.backend = 'reference', which runs every model on any device"
        ) from error
    return backend
