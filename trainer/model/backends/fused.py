"""Kernels for Hopper GPUs in bf16: grouped experts, flash attention, passes that a CUDA graph can hold."""

from functools import partial

from trainer.contract.activations import FUSED_LOSS_LOGITS
from trainer.model.backend import Backend
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.flash_attention import FlashCoreAttention
from trainer.model.fused_routing import route_and_balance
from trainer.model.fusing import fused
from trainer.model.grouped_experts import GroupedExperts
from trainer.model.support_loss import chunked_support_loss
from trainer.model.wide_product import wide_linear

FUSIONS = ("grouped_gemm",)
KEEPS = ("attention_sums", "unsorted_tokens", "captured_pass", "small_loss_chunks", "low_halves")

BACKEND = Backend(
    core_attention=FlashCoreAttention,
    experts=GroupedExperts,
    loss=partial(chunked_cross_entropy, chunk_logits=FUSED_LOSS_LOGITS),
    support_loss=partial(chunked_support_loss, chunk_logits=FUSED_LOSS_LOGITS),
    router_linear=wide_linear,
    route=route_and_balance,
    fuse=fused,
    in_line=True,
    capturable=True,
    slots=True,
    optimizer_kernels=True,
)
