"""Parameters that stay in fp32 whatever the model is cast to."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class Float32Parameters(nn.Module):
    """A module whose `float32_names` parameters and buffers keep fp32 through `.to(dtype)` and kin.

    A cast and a cast back would not do: a logit of 4.595 rounded to bf16 and back is another number, and the
    update of an optimizer step is often smaller than bf16's spacing there. So the cast is not applied to them
    in the first place; moves between devices are.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        protected = set()
        for name in self.float32_names:
            tensor = getattr(self, name, None)
            if tensor is not None:
                protected |= {id(tensor), id(tensor.grad)}
        protected.discard(id(None))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) in protected and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)


def require_float32(parameter: torch.Tensor, name: str) -> torch.Tensor:
    """Return `parameter`, or refuse it when something cast it below fp32.

    Raises:
        TypeError: Naming the parameter and its dtype.
    """
    if parameter.dtype != torch.float32:
        raise TypeError(
            f"{name} is {parameter.dtype}; it must stay torch.float32, because in a lower precision its "
            "updates round away. Cast the model with model.to(dtype), which leaves it alone, instead of "
            "assigning to parameter.data"
        )
    return parameter
