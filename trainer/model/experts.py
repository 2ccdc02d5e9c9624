"""Routed experts with stacked weights, one expert after another: the reference backend's."""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import nn

from trainer.model.config import VPTransformerConfig, squared_relu
from trainer.model.dispatch import ExpertExchange, assign
from trainer.model.parameters import mark


class StackedExperts(MegatronModule):
    """This rank's experts, one tensor per kind of weight.

    Stacking is what a grouped GEMM and a batched optimizer want: two tensors a layer instead of 2 · E. Every
    expert's matrix is a matrix of its own to the optimizer, and every bias a vector: `matrix_batch` and
    `vector_batch` say so.

    Attributes:
        weight1: `[E, F, H]`; `bias1` `[E, F]`; `weight2` `[E, H, F]`; `bias2` `[E, H]`; E
            counts the experts of this rank.
    """

    def __init__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.ep_group: dist.ProcessGroup = pg_collection.ep
        self.expert_dp_group: dist.ProcessGroup = pg_collection.expt_dp
        self.num_experts = config.num_moe_experts
        self.num_local_experts = config.num_moe_experts // self.ep_group.size()
        self.first_expert = self.ep_group.rank() * self.num_local_experts
        local, inner, outer = self.num_local_experts, config.moe_ffn_hidden_size, config.hidden_size

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(local, *shape, dtype=config.params_dtype))

        self.weight1, self.weight2 = stacked(inner, outer), stacked(outer, inner)
        self.bias1: nn.Parameter | None
        self.bias2: nn.Parameter | None
        if config.add_bias_linear:
            self.bias1, self.bias2 = stacked(inner), stacked(outer)
        else:
            self.register_parameter("bias1", None)
            self.register_parameter("bias2", None)
        # Megatron's mark for parameters whose gradients are summed over the expert data-parallel group
        # instead. With tensor parallelism that group spans the tensor-parallel ranks too, each of which works
        # on its share of tokens.
        separate = config.expert_model_parallel_size > 1 or config.tensor_model_parallel_size > 1
        for parameter in self.parameters():
            mark(parameter, allreduce=not separate, expert_parallel=True)
            mark(parameter, **{"matrix_batch" if parameter.dim() == 3 else "vector_batch": True})

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Take each token to its experts and add up what they return.

        Args:
            tokens: `[T, H]`.
            weights: fp32 `[T, K]`, routing weights p; 0 for padding.
            chosen: int64 `[T, K]`, experts of the whole model; E for padding, which meets none.

        Returns:
            `[T, H]`, zero for padding.
        """
        pairs = assign(chosen, self.num_experts)
        rows, scale = pairs.take(tokens), pairs.take_weights(weights)
        if self.ep_group.size() == 1:
            return pairs.combine(self.apply_to_rows(rows, scale, pairs.counts))
        exchange = ExpertExchange(pairs.counts, self.ep_group, tokens.device)
        arrived, arrived_scale = exchange.to_experts(rows), exchange.to_experts(scale)
        return pairs.combine(exchange.back(self.apply_to_rows(arrived, arrived_scale, exchange.counts)))

    def apply_to_rows(self, rows: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Apply each of this rank's experts to its rows.

        `h = relu(W₁ z + b₁)²`; `h ← p h`; `W₂ h + p b₂`: scaling inside equals scaling the output,
        since W₂ is linear, and costs F instead of H multiplications a row.

        Args:
            rows: `[n, H]`, sorted by expert.
            weights: fp32 `[n]`, routing weight p of each row.
            counts: Rows of each of this rank's experts.

        Returns:
            `[n, H]`, weighted.
        """
        # unbind's backward stacks the experts' gradients once; indexing would make a zero tensor [E, …] per
        # expert.
        weight1, weight2 = self.weight1.unbind(0), self.weight2.unbind(0)
        bias1 = (None,) * len(counts) if self.bias1 is None else self.bias1.unbind(0)
        bias2 = (None,) * len(counts) if self.bias2 is None else self.bias2.unbind(0)
        outputs = []
        for expert, (z, p) in enumerate(zip(rows.split(counts), weights.split(counts), strict=True)):
            if counts[expert] == 0:
                continue
            p = p[:, None]
            inner = squared_relu(nn.functional.linear(z, weight1[expert], bias1[expert]))
            inner = (inner.float() * p).to(z.dtype)
            output = nn.functional.linear(inner, weight2[expert])
            b2 = bias2[expert]
            outputs.append(output if b2 is None else output + (p * b2.float()).to(z.dtype))
        if outputs:
            return torch.cat(outputs)
        # No token on this rank. The (empty) result still hangs on the rows, so that the backward pass takes
        # part in the exchange between ranks, and on the parameters, so that they get a gradient (zero) as on
        # every other rank.
        zero = sum(parameter.sum() * 0.0 for parameter in self.parameters())
        return rows + weights[:, None].to(rows.dtype) + zero

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Split by expert over the expert-parallel group; copies live on the expert data-parallel group."""
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (axis, self.ep_group.rank(), self.ep_group.size()),
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, parameter in self.state_dict(prefix="", keep_vars=True).items()
        }
