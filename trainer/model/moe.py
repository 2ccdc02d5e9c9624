"""The mixture-of-experts layer: router, routed experts and the shared expert."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from trainer.model.backend import ExpertsFactory
from trainer.model.config import VPTransformerConfig
from trainer.model.ffn import DenseFFN
from trainer.model.fusing import Fuse, unfused
from trainer.model.parallel import gather_rows, split_rows
from trainer.model.router import Linear, Route, Router


class MoELayer(MegatronModule):
    """`y = Σ_e p_e FFN_e(z) + FFN_shared(z)`; the shared expert has weight 1 and no gate.

    Layouts: the router runs replicated on every tensor-parallel rank (same input, same choice); then each of
    them takes its share of the tokens, so that no expert sees a token twice, sends it to the ranks that hold
    its experts, and the results are gathered again. Experts themselves are never split.

    A token's result depends by rounding, and by nothing else, on what else is in the pass: an expert's
    product has a row for each token that reached it, and the library takes another kernel, with another order
    of summation, for another number of rows. So the logits of a document differ in their last bits between
    batches, and are the same bits for the same batch.
    """

    def __init__(
        self,
        config: VPTransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        experts: ExpertsFactory,
        route: Route,
        linear: Linear,
        fuse: Fuse = unfused,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self._fuse = fuse
        self.tp_group = pg_collection.tp
        self.layer_number: int | None = None
        self.router = Router(config, pg_collection, route=route, linear=linear)
        self.experts = experts(config, pg_collection)
        self.shared_experts: DenseFFN | None = None
        if config.moe_shared_expert_intermediate_size:
            width = config.moe_shared_expert_intermediate_size
            self.shared_experts = DenseFFN(config, pg_collection, width, fuse=fuse)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the 1-based number from Megatron's layer, which the `mlp` slot is not built with."""
        self.layer_number = layer_number

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Route and compute.

        Args:
            hidden: `[S, B, H]`, normalised.
            padding_mask: bool `[B, S]`, True where a token is padding: it meets the shared expert only.

        Returns:
            `[S, B, H]` and no bias: the experts' biases are weighted per token, so they are added inside.
        """
        weights, chosen = self.router(hidden, padding_mask)
        tokens = hidden.flatten(0, 1)
        output = self._routed(tokens, weights, chosen).view_as(hidden)
        if self.shared_experts is not None:
            run = self._fuse if self.training and torch.is_grad_enabled() else unfused
            output = run(add_shared)(output, *self.shared_experts(hidden))
        return output, None

    def _routed(self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        total = tokens.shape[0]
        mine = (split_rows(part, self.tp_group) for part in (tokens, weights, chosen))
        return gather_rows(self.experts(*mine), self.tp_group, total)


def add_shared(routed: torch.Tensor, shared: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Add the shared expert's output and its bias to that of the routed ones, `[S, B, H]`."""
    return routed + (shared if bias is None else shared + bias)
