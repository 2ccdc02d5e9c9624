"""The least that a training step must do: floating-point operations and bytes, by kind of layer.

Counted from the config. Products are counted as 2 m n k; forward once, backward twice. Of attention only the
pairs that its mask lets through count, as if every row were one document. Bytes are those that must cross the
device's memory whatever the kernels: of a layer, weights read in both passes, gradients written once, its
input and output in both passes; of the optimizer, gradients, state, master weights and weights once, and the
gradients once more for their norm. Small biases and gains are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.memory import WIDTHS
from trainer.contract.parameters import parameters
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.training import OptimizerConfig, TrainRecipe
from trainer.profiling.kinds import (
    EMBEDDING,
    EXPERTS,
    FFN,
    GLOBAL,
    HEAD,
    NORMS,
    OUTPUT,
    QKV,
    ROUTER,
    SHARED,
    TPA,
    WINDOW,
)

OPTIMIZER = "optimizer"
GRADIENT = 4
"""Bytes of a number of a gradient, which is float32."""
POLAR_EXPRESS_ITERATIONS = 5


@dataclass(frozen=True)
class Work:
    """What one step does at the least.

    Attributes:
        flops: Floating-point operations.
        bytes: To and from the device's memory.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Add up."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the time that it takes at the least, arithmetic and memory side by side."""
        return 1000 * max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def attended_pairs(length: int, window: int | None) -> int:
    """Count the pairs of query and key that a causal mask lets through in a row of one document.

    Args:
        length: Tokens of the row.
        window: Keys that a query sees at most, itself among them; None for all before it.
    """
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def step_work(recipe: TrainRecipe) -> dict[str, Work]:
    """Return the work of a step of a run by kind of layer, and that of its optimizer.

    Args:
        recipe: The run; the work is that of its global batch, whatever the number of ranks.
    """
    arch, training = recipe.architecture, recipe.training
    rows = training.global_batch_size
    tokens = rows * recipe.seq_len
    passes = rows // training.micro_batch_size
    width = WIDTHS[training.dtype]
    model, moe, tpa = arch.model, arch.moe, arch.tpa
    hidden, heads, groups, dim = (
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
    )

    def layer(flops: float, weights: float, read: float, written: float) -> Work:
        """Count a layer by operations and weights of its forward pass and widths of input and output."""
        moved = passes * weights * (2 * width + GRADIENT) + tokens * width * (3 * read + 2 * written)
        return Work(3 * flops, moved)

    def product(inner: int, outer: int) -> Work:
        return layer(2 * tokens * inner * outer, inner * outer, inner, outer)

    def two_products(inner: int, wide: int, count: int = 1, chosen: int = 1) -> Work:
        return layer(4 * tokens * chosen * inner * wide, count * 2 * inner * wide, inner, inner)

    def attention(window: int | None) -> Work:
        pairs = rows * attended_pairs(recipe.seq_len, window)
        return layer(4 * heads * dim * pairs, 0, (heads + 2 * groups) * dim, heads * dim)

    qkv = (heads + 2 * groups) * dim
    norm = layer(0, 0, hidden, hidden)
    found: dict[str, Work] = {}

    def add(kind: str, work: Work) -> None:
        found[kind] = found.get(kind, Work()) + work

    routed = set(moe_layers(arch))
    for number, kind in enumerate(layer_kinds(arch), start=1):
        local = kind == "local"
        add(WINDOW if local else GLOBAL, attention(arch.attention.window_size if local else None))
        if tpa.use_tpa and local:
            rank, q_rank = tpa.tpa_rank or 0, tpa.tpa_q_rank or 0
            factors = heads * q_rank + 2 * groups * rank + (q_rank + 2 * rank) * dim
            composed = 2 * tokens * dim * (heads * q_rank + 2 * groups * rank)
            add(TPA, layer(2 * tokens * hidden * factors + composed, hidden * factors, hidden, qkv))
        else:
            add(QKV, product(hidden, qkv))
        add(OUTPUT, product(heads * dim, hidden))
        add(NORMS, norm + norm)
        if number in routed and moe is not None:
            add(ROUTER, product(hidden, moe.num_experts))
            add(EXPERTS, two_products(hidden, model.ffn_hidden_size, moe.num_experts, moe.topk))
            if moe.shared_expert:
                add(SHARED, two_products(hidden, moe.shared_expert_size or 0))
        else:
            add(FFN, two_products(hidden, dense_ffn_hidden_size(arch)))
    add(NORMS, norm)
    add(EMBEDDING, layer(0, 0, 0, hidden))
    add(HEAD, product(hidden, arch.vocab_size))
    found[OPTIMIZER] = optimizer_work(arch, training.optimizer)
    return found


def optimizer_work(arch: Architecture, settings: OptimizerConfig) -> Work:
    """Return the work of updating every parameter once."""
    momentum = WIDTHS[settings.momentum_dtype]
    flops = moved = 0.0
    for parameter in parameters(arch):
        count = parameter.elements
        # The gradient twice; the master weight read and written, of which the weight is at best a half.
        each = 2 * GRADIENT + 2 * GRADIENT
        if parameter.kind == "matrices" and settings.name == "normuon":
            *_, rows, columns = parameter.shape
            short, long = sorted((rows, columns))
            number = count // (rows * columns)
            polynomial = 4 * short * short * long + 2 * short**3
            flops += number * POLAR_EXPRESS_ITERATIONS * polynomial
            moved += count * (each + 2 * momentum)
        else:
            moved += count * (each + 4 * GRADIENT)
    return Work(flops, moved)


def model_flops(work: Mapping[str, Work]) -> float:
    """Return the operations of the model alone in a step, by which its utilisation is told."""
    return sum(each.flops for kind, each in work.items() if kind != OPTIMIZER)
