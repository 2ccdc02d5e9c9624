"""The language model: Megatron's `GPTModel` with this architecture's layers and positions."""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import nn

from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError
from trainer.model.backend import load_backend
from trainer.model.config import VPTransformerConfig, transformer_config
from trainer.model.context import ForwardContext, KeyValueCache, forward_context
from trainer.model.document_mask import Documents
from trainer.model.init import initialize, leave_unfilled
from trainer.model.moe import MoELayer
from trainer.model.positions import GrapeM, Rope
from trainer.model.specs import block_spec
from trainer.model.support_loss import Rule


class VPGPTModel(GPTModel):
    """vpMoE and the dense rungs below it.

    Positions are applied inside attention, so `GPTModel` is told that there are none. Activations are `[S,
    B, H]` inside, batch-first at the edges.
    """

    config: VPTransformerConfig
    rotary_pos_emb: GrapeM | Rope | None

    def __init__(self, config: VPTransformerConfig, *, vocab_size: int, max_sequence_length: int) -> None:
        backend = load_backend(config.backend)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, backend),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            parallel_output=True,
        )
        self.backend = backend
        if config.rotation == "rope":
            self.rotary_pos_emb = Rope(config)
        elif any(config.local_layers):
            self.rotary_pos_emb = GrapeM(config, self.pg_collection.tp)
        else:
            self.rotary_pos_emb = None

    def forward_hidden(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        doc_id: torch.Tensor,
        cache: KeyValueCache | None = None,
        borders: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run everything but the head.

        Args:
            tokens: int64 `[B, S]`.
            position_ids: int64 `[B, S]`, from 0 inside each document.
            doc_id: int64 `[B, S]`; tokens see their own document only, -1 (padding) itself only.
            cache: Earlier tokens of the same rows; use it through `trainer.decoding.cache`, which keeps
                it in step with the other arguments.
            borders: See `trainer.model.document_mask.Documents.given`.

        Returns:
            `[S, B, H]` after the final norm, replicated over tensor-parallel ranks.

        Raises:
            ValueError: A shape or dtype is wrong, or a row is too long.
        """
        context = forward_context(
            tokens,
            position_ids,
            Documents(doc_id, borders),
            max_sequence_length=self.max_sequence_length,
        )
        context.cache = cache
        if self.backend.in_line and cache is None:
            tokens, context.position_ids = (part.reshape(1, -1) for part in (tokens, position_ids))
        if self.rotary_pos_emb is not None:
            context.rotation = self.rotary_pos_emb(context.position_ids)
        hidden = self._decode(tokens, context)
        rows, length = doc_id.shape
        return hidden if hidden.shape[0] == length else hidden.view(rows, length, -1).transpose(0, 1)

    def _decode(self, tokens: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        embedded = self.embedding(input_ids=tokens, position_ids=context.position_ids)
        hidden: torch.Tensor = self.decoder(
            hidden_states=embedded, attention_mask=context, padding_mask=context.padding
        )
        return hidden

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor, doc_id: torch.Tensor) -> torch.Tensor:
        """Logits `[B, S, V / tp]` of this rank's part of the vocabulary; for tests and evaluation.

        Training never calls it: it takes `forward_hidden` and computes the loss in chunks.
        """
        logits, _bias = self.output_layer(self.forward_hidden(tokens, position_ids, doc_id))
        return logits.transpose(0, 1).contiguous()

    def cross_entropy(
        self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, select: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take hidden states through the head and the cross-entropy, by the backend's loss.

        Args:
            hidden: `[S, B, H]`, of `forward_hidden`.
            labels: int64 `[B, S]`.
            weights: fp32 `[B, S]`, weight of each token in the sum; no gradient flows to it.
            select: bool `[B, S]`, tokens whose loss is wanted; others count as 0.

        Returns:
            The weighted sum, a differentiable scalar, and the loss of each token `[B, S]`, detached; equal on
            all tensor-parallel ranks.

        Raises:
            LossError: A selected label is outside the vocabulary.
        """
        loss, losses = self.backend.loss(
            hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]),
            self.head_weight,
            labels.reshape(-1),
            weights.reshape(-1),
            select=select.reshape(-1),
            group=self.pg_collection.tp,
        )
        return loss, losses.view(labels.shape)

    def support_loss(
        self,
        hidden: torch.Tensor,
        support: torch.Tensor,
        rule: Rule,
        select: torch.Tensor,
        highest: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take hidden states through the head and a loss of a few log-probabilities, by the backend.

        Args:
            hidden: `[S, B, H]`, of `forward_hidden`.
            support: int64 `[B, S, n]`, ids whose log-probabilities the rule sees, -1 where there is none.
            rule: The loss of a chunk of tokens, see `trainer.model.support_loss.Rule`; its `rows` are places
                in the batch's fields, flattened to `[B * S]`.
            select: bool `[B, S]`, tokens that have a loss; others count as 0.
            highest: fp32 `[B, S]`, filled where given with the log-probability of each selected token's
                likeliest id.

        Returns:
            The sum, a differentiable scalar, and the loss of each token `[B, S]`, detached; equal on all
            tensor-parallel ranks.

        Raises:
            LossError: A selected token asks for an id outside the vocabulary.
        """
        loss, losses = self.backend.support_loss(
            hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]),
            self.head_weight,
            support.reshape(-1, support.shape[-1]),
            rule,
            select=select.reshape(-1),
            highest=None if highest is None else highest.view(-1),
            group=self.pg_collection.tp,
        )
        return loss, losses.view(select.shape)

    @property
    def head_weight(self) -> nn.Parameter:
        """`[V / tp, H]`, this rank's rows of the output head."""
        weight: nn.Parameter = self.output_layer.weight
        return weight

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first layer first."""
        return [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, MoELayer)]

    @property
    def moe_layer_numbers(self) -> list[int]:
        """1-based numbers of the MoE layers."""
        return list(self.config.moe_layers)

    def pop_aux_loss(self, *, check_finite: bool = True) -> torch.Tensor:
        """Auxiliary loss of the last training pass, taken: a second call returns 0.

        The sum over MoE layers of the coefficient times the layer's loss, each a mean over the rows of the
        micro-batch. A step of n micro-batches on d data-parallel ranks should weight it by 1 / (n · d), rows
        per micro-batch being equal; it is identical on all tensor-parallel ranks.

        Args:
            check_finite: Look at the value, which waits for the device.

        Returns:
            fp32, 0-dimensional, differentiable.

        Raises:
            FloatingPointError: It is NaN or infinite, naming the layers.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.head_weight.device)
        losses = {}
        for number, layer in zip(self.moe_layer_numbers, self.moe_layers, strict=True):
            if layer.router.aux_loss is not None:
                losses[number] = layer.router.aux_loss
                total = total + layer.router.aux_loss
                layer.router.aux_loss = None
        if check_finite and losses and not math.isfinite(total.item()):
            bad = [str(number) for number, loss in losses.items() if not math.isfinite(loss.item())]
            raise FloatingPointError(
                f"the routers' auxiliary loss is not finite in layer(s) {', '.join(bad)}: the activations or "
                "router weights have overflowed; go back to the last checkpoint and lower the learning rate"
            )
        return total

    def router_counts(self) -> torch.Tensor:
        """Tokens each expert was chosen for since the last reset, int64 `[MoE layers, E]`.

        Those of this data-parallel rank, in training passes, padding left out; equal on all tensor-parallel
        ranks, so sum over data-parallel ranks alone.
        """
        return torch.stack([layer.router.tokens_per_expert for layer in self._require_moe()])

    def reset_router_counts(self) -> None:
        """Start counting anew."""
        for layer in self.moe_layers:
            layer.router.tokens_per_expert.zero_()

    def update_expert_bias(self, global_counts: torch.Tensor) -> None:
        """Steer each router towards an even load: `b_e += rate · sign(mean(n) − n_e)`.

        No effect where `moe.router_enable_expert_bias` is off.

        Args:
            global_counts: `[MoE layers, E]`, `router_counts` summed over data-parallel ranks.
        """
        biases = self._expert_bias_buffers()
        if not biases:
            return
        load = global_counts.to(biases[0].device, torch.float64)
        step = torch.sign(load.mean(dim=1, keepdim=True) - load).float()
        with torch.no_grad():
            torch._foreach_add_(biases, list(self.config.moe_router_bias_update_rate * step))

    def expert_biases(self) -> torch.Tensor | None:
        """Fp32 `[MoE layers, E]`, or None without MoE layers or with the bias off."""
        biases = self._expert_bias_buffers()
        return torch.stack(biases) if biases else None

    def _expert_bias_buffers(self) -> list[torch.Tensor]:
        found = (layer.router.expert_bias for layer in self.moe_layers)
        return [bias for bias in found if bias is not None]

    def _require_moe(self) -> list[MoELayer]:
        if not self.moe_layers:
            raise ValueError("this model is dense: it has no router; ask moe_layer_numbers first")
        return self.moe_layers


def build_model(
    arch: Architecture,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int | None = 1234,
    backend: str = "reference",
    **overrides: Any,
) -> VPGPTModel:
    """Build this rank's part of a model and fill it with its initial weights, or leave that to a loader.

    The layout is that of Megatron's parallel state. Where no process group exists, one of a single process is
    made (in memory, no network), so that a script or a count needs no launcher.

    Args:
        arch: The rung's architecture.
        dtype: `torch.float32` or `torch.bfloat16`; ω, `log_freq` and expert biases stay fp32.
        device: `cpu`, `cuda` or `meta` (shapes only, no weights).
        seed: Of the initial weights. None draws nothing: every weight is NaN until it is loaded, and
            whoever loads asks `trainer.model.init.require_filled` afterwards.
        backend: Name of a module of `trainer.model.backends`.
        **overrides: Further `TransformerConfig` fields.

    Returns:
        The model, in training mode.

    Raises:
        ConfigError: The architecture cannot run in this layout or on this backend.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "execution.device = 'cuda': torch finds no CUDA device here; set execution.device = 'cpu'"
        )
    ensure_parallel_state()
    stages = {"pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size()}
    config = transformer_config(
        arch,
        dtype=dtype,
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        backend=backend,
        **(stages | overrides),
    )
    with torch.device(device):
        model = VPGPTModel(
            config, vocab_size=arch.vocab_size, max_sequence_length=arch.attention.max_sequence_length
        )
    model.to(dtype)  # torch's norms are made in fp32
    if device.type == "meta":
        return model
    if seed is None:
        leave_unfilled(model)
    else:
        initialize(
            model,
            config,
            seed,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        )
    return model


def ensure_parallel_state() -> None:
    """Make the groups of a single process where there are none; refuse a layout that experts cannot use.

    Raises:
        ConfigError: Experts would be split over tensor-parallel ranks, or `torch.distributed` runs without
            Megatron's parallel state.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        if dist.get_world_size() > 1:
            raise ConfigError(
                f"torch.distributed runs {dist.get_world_size()} ranks, but their tensor- and "
                "expert-parallel groups are not set up; call "
                "megatron.core.parallel_state.initialize_model_parallel(…, expert_tensor_parallel_size=1)"
            )
        parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1)
    if (split := parallel_state.get_expert_tensor_parallel_world_size()) != 1:
        raise ConfigError(
            f"expert_tensor_parallel_size = {split}: a biased expert is not split over ranks; "
            "call initialize_model_parallel(…, expert_tensor_parallel_size=1)"
        )
