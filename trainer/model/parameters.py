"""What a parameter says about itself to the optimizer, the checkpoint and the reduction of gradients."""

from torch import nn


def mark(
    parameter: nn.Parameter,
    *,
    keep_fp32: bool | None = None,
    adamw_only: bool | None = None,
    matrix_batch: bool | None = None,
    vector_batch: bool | None = None,
    allreduce: bool | None = None,
    expert_parallel: bool | None = None,
    partition_dim: int | None = None,
) -> nn.Parameter:
    """Set attributes on a parameter; those left at None are not set.

    Args:
        parameter: The parameter.
        keep_fp32: It is fp32 in a model of any dtype.
        adamw_only: AdamW updates it whatever its rank.
        matrix_batch: A rank-3 stack of matrices, each a matrix of its own to the optimizer.
        vector_batch: A rank-2 stack of vectors, never a matrix to the optimizer.
        allreduce: Megatron's mark; False sums its gradient over the expert data-parallel group instead.
        expert_parallel: Its first axis is split over the expert-parallel group.
        partition_dim: Axis that is split over tensor-parallel ranks; sets `tensor_model_parallel` too.
    """
    marks = {
        "keep_fp32": keep_fp32,
        "adamw_only": adamw_only,
        "matrix_batch": matrix_batch,
        "vector_batch": vector_batch,
        "allreduce": allreduce,
        "expert_parallel": expert_parallel,
        "partition_dim": partition_dim,
        "partition_stride": None if partition_dim is None else 1,
        "tensor_model_parallel": None if partition_dim is None else True,
    }
    for name, value in marks.items():
        if value is not None:
            setattr(parameter, name, value)
    return parameter


def mark_written(*parameters: nn.Parameter) -> None:
    """Say that this step's gradients of some parameters stand in their `main_grad`.

    Autograd's own gradients are marked by the optimizer's hook. Whatever writes `main_grad` past it calls
    this: a kernel in its backward pass, or whoever replays a captured graph, after each replay, for every
    parameter whose gradient the graph holds. A parameter that requires a gradient and is not marked stops the
    step.

    Args:
        parameters: Those whose gradient was put into `main_grad`: over what stood there where
            `is_written` says that this is the step's first, added to it otherwise.
    """
    for parameter in parameters:
        parameter.main_grad_written = True  # type: ignore[attr-defined]


def is_written(parameter: nn.Parameter) -> bool:
    """Return whether `main_grad` holds a gradient of this step, which a further one is added to."""
    return bool(getattr(parameter, "main_grad_written", False))


def take_written(parameter: nn.Parameter) -> bool:
    """Return whether `mark_written` was called for a parameter since the last call of this."""
    written: bool = getattr(parameter, "main_grad_written", False)
    parameter.main_grad_written = False  # type: ignore[attr-defined]
    return written
