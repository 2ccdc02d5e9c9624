"""A first phase in which only some layers train.

New layers whose residual branches are zero get gradients on their output projections alone at first. Were
everything trained at once, the old layers, which are trained already, would move with the noise of a fresh
optimizer before the new ones do anything useful.

The phase has no state of its own: the optimizer's step count decides, so a run that resumes on either side of
the border is in the right phase. What rests gets no gradient, no weight decay and no moments; when it wakes,
AdamW's bias correction counts from there, because that is how old its averages are.
"""

from collections.abc import Collection

from torch import nn

from trainer.errors import OptimizerError


def train_only_layers(model: nn.Module, layers: Collection[int], steps: int) -> None:
    """Mark every parameter outside some decoder layers as resting for the first steps of a run.

    Call it before the optimizer is made, which reads the marks.

    Args:
        model: A model with `decoder.layers`, without pipeline parallelism.
        layers: 1-based numbers of the layers that train from the start.
        steps: How long the others rest.

    Raises:
        OptimizerError: The model has no such layer, or the marks would leave nothing to train.
    """
    if not steps:
        return
    training: set[int] = set()
    found: set[int] = set()
    for layer in model.decoder.layers:  # type: ignore[union-attr]
        if layer.layer_number in layers:
            found.add(layer.layer_number)
            training.update(id(param) for param in layer.parameters())
    if missing := sorted(set(layers) - found):
        raise OptimizerError(f"layers {missing} are to be trained alone, and the model does not have them.")
    if not training:
        raise OptimizerError("a first phase without layers to train: name them, or set its steps to 0.")
    for param in model.parameters():
        if id(param) not in training:
            param.frozen_steps = steps  # type: ignore[attr-defined]
