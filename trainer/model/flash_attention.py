"""Core attention by flash-attn-4's kernels: the `fused` backend's.

Everything that this architecture asks of attention stands in one kernel: a causal window, a learnable sink,
ALiBi as a modification of the scores, and the documents of packed rows as sequences of their own. It is made
deterministic in both directions, so that a run goes on bit by bit where it was stopped.

flash-attn-4 is a beta. What was found wrong with it (ALiBi with grouped key/value heads on Hopper: gradients
off by a factor of tens, without an error) is kept out here, and tests on every card compare its gradients
with the reference's.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from trainer.contract.schema.base import ConfigError
from trainer.model.config import VPTransformerConfig
from trainer.model.core_attention import ReferenceCoreAttention
from trainer.model.document_mask import Documents

CAPABILITY = (9, 0)
"""Of the cards that these kernels were measured right on."""
HEAD_DIMS = (64, 128)


class FlashCoreAttention(ReferenceCoreAttention):
    """The same attention in one kernel a direction; to kept keys it attends as the reference does.

    Raises:
        ConfigError: The card, the dtype, the widths or the installation have no such kernel.
    """

    def __init__(
        self, config: VPTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        self.first_head = self.tp_group.rank() * self.heads
        self.all_heads = config.num_attention_heads
        _require_kernels(config, torch.empty(0).device)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Attend; see `ReferenceCoreAttention.forward`. What padding sees differs, and nobody reads it."""
        if query.device.type != "cuda":
            raise ConfigError(
                f"training.backend = 'fused': its attention runs on CUDA, the model is on {query.device}; "
                "set training.backend = 'reference'"
            )
        from flash_attn.cute import flash_attn_varlen_func

        length, batch, heads, dim = query.shape
        modifications: dict[str, Any] = {}
        if self.slopes is not None:
            forward, backward = _alibi(self.first_head, self.all_heads)
            modifications = {"score_mod": forward, "score_mod_bwd": backward}
            per_group = heads // self.groups
            if per_group > 1:  # the Hopper backward of grouped heads gives `score_mod` wrong heads and places
                key, value = (part.repeat_interleave(per_group, dim=2) for part in (key, value))
        out, _ = flash_attn_varlen_func(
            *(part.transpose(0, 1).flatten(0, 1).contiguous() for part in (query, key, value)),
            cu_seqlens_q=documents.borders,
            cu_seqlens_k=documents.borders,
            max_seqlen_q=documents.doc_id.shape[1],
            max_seqlen_k=documents.doc_id.shape[1],
            softmax_scale=self.scale,
            causal=True,
            window_size=(None, None) if self.window is None else (self.window - 1, 0),
            learnable_sink=self._sink(query),
            deterministic=True,
            **modifications,
        )
        attended: torch.Tensor = out.view(batch, length, heads * dim).transpose(0, 1)
        return attended

    def _sink(self, query: torch.Tensor) -> torch.Tensor | None:
        if self.softmax_type == "vanilla":
            return None
        if self.softmax_offset is None:
            return query.new_zeros(self.heads)
        return self.softmax_offset


@cache
def _alibi(first_head: int, heads: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make the score modification of ALiBi and its derivative, for `heads` a power of two.

    Masked positions come here too, so the distance is held at 0: far ahead the score would overflow.

    Args:
        first_head: Number of this rank's first head.
        heads: Of all ranks.
    """
    import cutlass
    from cutlass import cute

    step = -8.0 / heads

    @cute.jit
    def forward(  # type: ignore[no-untyped-def]
        score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors
    ):
        distance = (q_idx - kv_idx).to(cutlass.Float32)
        slope = cute.math.exp2((h.to(cutlass.Float32) + (first_head + 1.0)) * step)
        return score - slope * cute.where(distance > 0.0, distance, cute.full_like(distance, 0.0))

    @cute.jit
    def backward(  # type: ignore[no-untyped-def]
        grad, score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors
    ):
        return grad

    return forward, backward


def _require_kernels(config: VPTransformerConfig, device: torch.device) -> None:
    """Refuse what the kernels do not do; a model of shapes alone (`meta`) asks for none."""
    if device.type == "meta":
        return
    remedy = "set training.backend = 'reference'"
    if config.params_dtype != torch.bfloat16:
        raise ConfigError(
            f"training.dtype: found {config.params_dtype}; fused attention is bf16, so take training.dtype = "
            f"'bf16', or {remedy}"
        )
    if config.kv_channels not in HEAD_DIMS:
        raise ConfigError(
            f"model.head_dim = {config.kv_channels}: fused attention takes "
            f"{' or '.join(map(str, HEAD_DIMS))}; {remedy}"
        )
    heads = config.num_attention_heads
    if config.alibi and heads & (heads - 1):
        raise ConfigError(
            f"model.num_attention_heads = {heads} with grape.grape_a = true: fused attention knows the "
            f"slopes of powers of two; {remedy}"
        )
    if device.type != "cuda":
        raise ConfigError(
            f"training.backend = 'fused': its attention runs on CUDA, and the device is {device}; {remedy}"
        )
    if (found := torch.cuda.get_device_capability(device)) != CAPABILITY:
        raise ConfigError(
            f"training.backend = 'fused': its kernels were measured on compute capability "
            f"{'.'.join(map(str, CAPABILITY))}, {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, found))}; {remedy}"
        )
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"training.backend = 'fused': flash-attn-4 cannot be imported ({error}); install it as "
            f"README.md says, or {remedy}"
        ) from error
