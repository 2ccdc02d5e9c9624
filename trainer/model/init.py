"""Initial weights, made by name: the same model whatever the layout, device or order of construction."""

import hashlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.positions import initial_log_freq
from trainer.model.value_residual import initial_logit

INIT_STD = 0.02

_ZEROS = re.compile(r"(^|\.)(bias|bias1|bias2)$")
_ONES = re.compile(r"(input_layernorm|pre_mlp_layernorm|final_layernorm|q_layernorm|k_layernorm)\.weight$")
_DOWN = re.compile(r"(linear_proj\.weight|linear_fc2\.weight|experts\.weight2)$")
_NORMAL = re.compile(
    r"(linear_qkv\.weight|linear_tpa\.[ab]_[qkv]|linear_fc1\.weight|experts\.weight1|router\.weight|softmax_offset"
    r"|word_embeddings\.weight|output_layer\.weight)$"
)


DRAW_ELEMENTS = 1 << 22
"""About how many numbers of a stack of experts one thread draws at a time."""


@dataclass(frozen=True)
class _Draw:
    """Normal numbers to draw for a part of a parameter.

    Attributes:
        target: What they go into.
        shape: What is drawn whole for one name.
        names: One generator each, `shape` numbers each.
        std: Standard deviation.
        cut: This rank's share of what was drawn: axis, start, length; None keeps all.
    """

    target: torch.Tensor
    shape: tuple[int, ...]
    names: tuple[tuple[object, ...], ...]
    std: float
    cut: tuple[int, int, int] | None = None

    def size(self) -> int:
        """Count the numbers: what one thread draws alone begins first."""
        return len(self.names) * math.prod(self.shape)

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Draw in fp32 on the CPU, cast there, and fill the target."""
        drawn = torch.empty((len(self.names), *self.shape), dtype=torch.float32)
        for one, names in zip(drawn, self.names, strict=True):
            one.normal_(0.0, self.std, generator=named_generator(seed, *names))
        if self.cut is not None:
            axis, start, length = self.cut
            drawn = drawn.narrow(1 + axis, start, length)
        target = self.target.detach()
        target.copy_(drawn.reshape(target.shape).to(target.dtype))


@torch.no_grad()
def initialize(
    model: nn.Module, config: VPTransformerConfig, seed: int, *, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of this rank.

    Linear weights, embedding, head and sinks are N(0, 0.02²); output projections and FFN down projections
    N(0, (0.02 / √(2L))²); biases 0, gains 1; ω and `log_freq` by their formulas. A random tensor is drawn
    whole, in fp32 on the CPU, from a generator seeded by (seed, name) or, for experts, (seed, name, global
    expert number), and then cut to this rank's share. Two layouts, or a CPU and a GPU, therefore start from
    the same bits.

    Each generator is one thread's from first number to last, so the bits do not depend on how many threads
    draw at once, which is as many as torch may use on this rank.

    Args:
        model: Built, unfilled.
        config: Its config.
        seed: Of the experiment.
        tp_rank: This rank in the tensor-parallel group.
        tp_size: Size of that group.

    Raises:
        ValueError: A parameter's name matches no rule.
    """
    down_std = INIT_STD / math.sqrt(2 * config.num_layers)
    draws: list[_Draw] = []
    for name, parameter in model.named_parameters():
        if name.endswith("value_residual_logit"):
            parameter.fill_(initial_logit(config.value_residual_init, config.value_residual_eps))
        elif name.endswith("log_freq"):
            parameter.copy_(initial_log_freq(config.kv_channels, config.rotation_base, config.log_freq_scale))
        elif _ONES.search(name):
            parameter.fill_(1.0)
        elif _ZEROS.search(name):
            parameter.zero_()
        elif _DOWN.search(name):
            draws += _draws(parameter, name, down_std, model, tp_rank, tp_size)
        elif _NORMAL.search(name):
            draws += _draws(parameter, name, INIT_STD, model, tp_rank, tp_size)
        else:
            raise ValueError(
                f"parameter {name} {list(parameter.shape)} has no initialisation rule in trainer.model.init"
            )
    threads = torch.get_num_threads()
    try:
        # One thread each: a cast by threads that share it out again is mostly waiting, sixteen times sixteen.
        with ThreadPoolExecutor(threads, "initialize", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(lambda draw: draw.fill(seed), sorted(draws, key=_Draw.size, reverse=True)):
                pass
    finally:
        torch.set_num_threads(threads)  # of threads to come: what a thread sets is its own and theirs


@torch.no_grad()
def leave_unfilled(model: nn.Module) -> None:
    """Make every weight NaN, so that one which nobody loads is found: by `require_filled`, or by any loss."""
    for _, tensor in _weights(model):
        tensor.fill_(float("nan"))


def require_filled(model: nn.Module, source: object) -> None:
    """Refuse a model that is not whole after its weights were loaded.

    Args:
        model: Built by `build_model(seed=None)`, then loaded.
        source: Where the weights came from, for the message.

    Raises:
        ValueError: A parameter or a persistent buffer holds NaN, as it does when nothing was loaded into it.
    """
    left = [name for name, tensor in _weights(model) if tensor.isnan().any()]
    if left:
        raise ValueError(
            f"{source}: {len(left)} tensors of the model hold NaN after loading, {', '.join(left[:4])}: they "
            "are missing there or damaged"
        )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, as far as they are floating-point numbers."""
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield name, value


def named_generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator of its own for a name, independent of all others and of the order of asking."""
    text = ":".join(str(part) for part in (seed, *names))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draws(
    parameter: nn.Parameter, name: str, std: float, model: nn.Module, tp_rank: int, tp_size: int
) -> Iterator[_Draw]:
    """Return what a parameter needs drawn; a stack of experts in pieces of a few experts each."""
    if getattr(parameter, "expert_parallel", False):
        first: int = model.get_submodule(name.rpartition(".")[0]).first_expert  # type: ignore[assignment]
        step = max(1, DRAW_ELEMENTS // parameter[0].numel())
        for start in range(0, len(parameter), step):
            target = parameter[start : start + step]
            names = tuple((name, first + start + local) for local in range(len(target)))
            yield _Draw(target, tuple(parameter.shape[1:]), names, std)
        return
    shape = list(parameter.shape)
    split = getattr(parameter, "tensor_model_parallel", False)
    axis: int = getattr(parameter, "partition_dim", -1) if split else -1
    cut = None
    if axis >= 0:
        shape[axis] *= tp_size
        cut = (axis, tp_rank * parameter.shape[axis], parameter.shape[axis])
    yield _Draw(parameter, tuple(shape), ((name,),), std, cut)
