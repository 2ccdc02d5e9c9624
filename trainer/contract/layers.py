"""What each layer of an architecture is: its kind of attention, its kind of FFN, its width."""

from trainer.contract.pattern import LayerKind, layer_pattern
from trainer.contract.schema.architecture import Architecture


def layer_kinds(architecture: Architecture) -> tuple[LayerKind, ...]:
    """Kind of each layer, first to last: `local` (window, TPA, GRAPE-M) or `global` (full causal)."""
    attention = architecture.attention
    return layer_pattern(
        architecture.model.num_layers, attention.window_size, attention.window_attn_skip_freq
    )


def moe_layers(architecture: Architecture) -> tuple[int, ...]:
    """1-based numbers of the layers with routed experts."""
    if architecture.moe is None:
        return ()
    return tuple(range(2 if architecture.moe.first_layer_dense else 1, architecture.model.num_layers + 1))


def dense_ffn_hidden_size(architecture: Architecture) -> int:
    """Width of a dense FFN layer, its default resolved."""
    return architecture.model.dense_ffn_hidden_size or architecture.model.ffn_hidden_size
