"""Which algorithm, weight decay and learning rate each parameter gets.

A parameter states its nature by attributes set where it is made; names are never parsed:

* `is_embedding_or_output_parameter`: the input embedding or the output head (Megatron sets it);
* `matrix_batch`: a rank-3 stack `[E, m, n]` of E separate matrices;
* `vector_batch`: a rank-2 stack `[E, n]` of E vectors, such as the biases of all experts;
* `adamw_only`: never a matrix to NorMuon, whatever its rank;
* `keep_fp32`: must not have been cast below float32;
* `allreduce = False`: expert-parallel (Megatron's convention);
* `frozen_steps`: rests for that many first steps of the run (see `trainer.optim.freezing`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.contract.schema.training import OptimizerConfig
from trainer.errors import OptimizerError

Algorithm = Literal["normuon", "adamw", "sgd"]
Kind = Literal["matrices", "embeddings", "vectors"]


@dataclass(frozen=True)
class Route:
    """What happens to one parameter.

    Attributes:
        kind: `matrices`, `embeddings` (with the output head) or `vectors` (everything else).
        algorithm: `normuon`, `adamw` or `sgd`.
        expert_parallel: Reduced over the expert-data-parallel group.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        frozen_steps: First steps of the run in which it gets no gradient, no decay and no state.
    """

    kind: Kind
    algorithm: Algorithm
    expert_parallel: bool
    lr: float
    weight_decay: float
    frozen_steps: int = 0


@dataclass(frozen=True)
class Routed:
    """A parameter with its route.

    Attributes:
        name: Full name in the model.
        param: The parameter.
        route: Where it goes.
    """

    name: str
    param: torch.nn.Parameter
    route: Route


def route_parameter(name: str, param: torch.nn.Parameter, settings: OptimizerConfig) -> Route:
    """Route one parameter.

    With `name = "normuon"` NorMuon takes every matrix but the embedding and the head, with weight decay;
    AdamW takes the rest: vectors never decay, embedding and head by a key of their own. `adam` and `sgd`
    use one algorithm for everything, with the same rates and decays.

    Args:
        name: Full name, for messages.
        param: The parameter with its attributes.
        settings: The optimizer's configuration.

    Returns:
        The route.

    Raises:
        OptimizerError: The parameter's rank and attributes do not add up to one nature, or it should be
            float32 and is not.
    """
    kind = _kind(name, param)
    if getattr(param, "keep_fp32", False) and param.dtype != torch.float32:
        raise OptimizerError(
            f"{name}: must stay float32 (in {param.dtype} its gradient rounds away) but is {param.dtype}. "
            f"Exclude it from the cast."
        )
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise OptimizerError(f"{name}: dtype {param.dtype} is not trained here; use float32 or bfloat16.")
    vector_lr = settings.lr if settings.normuon_aux_lr is None else settings.normuon_aux_lr
    embedding_lr = vector_lr if settings.decoupled_lr is None else settings.decoupled_lr
    return Route(
        kind=kind,
        algorithm=_algorithm(kind, settings),
        expert_parallel=not getattr(param, "allreduce", True),
        lr={"matrices": settings.lr, "embeddings": embedding_lr, "vectors": vector_lr}[kind],
        weight_decay={
            "matrices": settings.weight_decay,
            "embeddings": settings.embedding_weight_decay,
            "vectors": 0.0,
        }[kind],
        frozen_steps=getattr(param, "frozen_steps", 0),
    )


def _algorithm(kind: Kind, settings: OptimizerConfig) -> Algorithm:
    if settings.name == "sgd":
        return "sgd"
    return "normuon" if settings.name == "normuon" and kind == "matrices" else "adamw"


def _kind(name: str, param: torch.nn.Parameter) -> Kind:
    claims = [
        claim
        for claim in ("is_embedding_or_output_parameter", "matrix_batch", "vector_batch", "adamw_only")
        if getattr(param, claim, False)
    ]
    shape = list(param.shape)
    if len(claims) > 1:
        raise OptimizerError(
            f"{name} {shape}: belongs to two groups, it says {' and '.join(claims)}; keep one."
        )
    claim = claims[0] if claims else None
    ranks = {"is_embedding_or_output_parameter": 2, "matrix_batch": 3, "vector_batch": 2}
    if claim in ranks and param.ndim != ranks[claim]:
        raise OptimizerError(
            f"{name} {shape}: {claim} is for parameters of rank {ranks[claim]}, this one has rank "
            f"{param.ndim}."
        )
    if claim == "is_embedding_or_output_parameter":
        return "embeddings"
    if claim in ("vector_batch", "adamw_only") or param.ndim < 2:
        return "vectors"
    if claim == "matrix_batch" or param.ndim == 2:
        return "matrices"
    raise OptimizerError(
        f"{name} {shape}: belongs to no group: rank {param.ndim} without matrix_batch. Set "
        "param.matrix_batch = True "
        f"on a stack [E, m, n] of separate matrices, or param.adamw_only = True."
    )


def route_model(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig
) -> list[Routed]:
    """Route every parameter of a model, each exactly once.

    Parameters that are frozen now (`requires_grad` False) are routed too: they may be thawed later in the
    run, and a checkpoint should not depend on when.

    Args:
        named_parameters: As `model.named_parameters()` gives them; their order fixes every later order.
        settings: The optimizer's configuration.

    Returns:
        The routed parameters in the given order.

    Raises:
        OptimizerError: A parameter fits no group or two, the same tensor comes twice, or there is none.
    """
    routed: list[Routed] = []
    names: dict[int, str] = {}
    for name, param in named_parameters:
        if id(param) in names:
            raise OptimizerError(
                f"{name} and {names[id(param)]} are the same tensor: it would be in two groups."
            )
        names[id(param)] = name
        routed.append(Routed(name, param, route_parameter(name, param, settings)))
    if not routed:
        raise OptimizerError("the model has no parameters to train.")
    return routed
