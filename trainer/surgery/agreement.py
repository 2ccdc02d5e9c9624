"""Do two checkpoints compute the same function? Both run one layer at a time on the same seeded tokens."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.rungs.rung import RungRecipe
from trainer.surgery.calibration import NO_LABEL, Batch
from trainer.surgery.step import Conversion
from trainer.surgery.streams import StudentStream
from trainer.surgery.tensors import FINAL_NORM, HEAD
from trainer.surgery.weights import WeightsReader

ROWS, LENGTH = 2, 160
"""The fixed batch, where the model takes rows of this length: they reach past a window of 128."""

VOCABULARY_CHUNK = 32768
"""Rows of the head that are in memory at once."""

Observer = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class LogitAgreement:
    """Logits of two checkpoints over the same batch, in fp32 arithmetic.

    Attributes:
        equal: Every bit the same.
        max_abs_difference: 0.0 where equal.
        max_abs_logit: Of the parent, to judge the difference by.
        tokens: Positions compared, each over the whole vocabulary.
    """

    equal: bool
    max_abs_difference: float
    max_abs_logit: float
    tokens: int

    def describe(self) -> dict[str, float | int | bool]:
        """As plain values."""
        return asdict(self)


def compare_to_parent(
    conversion: Conversion,
    recipe: RungRecipe,
    payload: Path,
    observe: Observer = lambda number, layer: None,
) -> tuple[LogitAgreement, list[float]]:
    """Run parent and result over the same batch.

    Args:
        conversion: With the parent as its source.
        recipe: Its recipe.
        payload: The result.
        observe: Sees each of the result's layers before it runs.

    Returns:
        How the logits compare, and for each of the result's layers how much it changes the residual stream:
        Root mean square of what it adds over that of what it is given.
    """
    batch = seeded_batch(conversion, recipe.architecture)
    with WeightsReader(conversion.source) as source, WeightsReader(payload) as target:
        theirs, _ = run_through(conversion, "run the parent", recipe.parent, source, batch)
        ours, changes = run_through(conversion, "run the result", recipe.architecture, target, batch, observe)
        epsilon = recipe.architecture.model.norm_epsilon
        return compare_logits((ours, target), (theirs, source), epsilon), changes


def seeded_batch(conversion: Conversion, architecture: Architecture) -> Batch:
    """Uniform token ids, two documents in the first row; the same for the same seed."""
    length = min(LENGTH, architecture.attention.max_sequence_length)
    generator = conversion.generator("function check")
    tokens = torch.randint(0, architecture.vocab_size, (ROWS, length), generator=generator)
    cut = length // 3
    position_ids = torch.arange(length).repeat(ROWS, 1)
    position_ids[0, cut:] -= cut
    doc_id = torch.zeros_like(tokens)
    doc_id[0, cut:] = 1
    return Batch(tokens, position_ids, doc_id, torch.full_like(tokens, NO_LABEL))


def run_through(
    conversion: Conversion,
    name: str,
    architecture: Architecture,
    reader: WeightsReader,
    batch: Batch,
    observe: Observer = lambda number, layer: None,
) -> tuple[StudentStream, list[float]]:
    """Take a batch through all layers of a checkpoint, one in memory at a time.

    Args:
        conversion: For progress, stop and device.
        name: Of the phase.
        architecture: Of the checkpoint.
        reader: Its weights.
        batch: The tokens.
        observe: Sees each layer (its 1-based number) with its weights before it runs.

    Returns:
        The stream after the last layer, and each layer's change of it.
    """
    changes: list[float] = []
    with conversion.phase(name, architecture.model.num_layers, unit="layer") as tick:
        stream = StudentStream(architecture, reader.read, [batch], device=conversion.device)
        for number in range(1, stream.layers + 1):
            layer = stream.load(number)
            observe(number, layer)
            before = stream.hidden[0]
            stream.run(layer)
            changes.append(float((stream.hidden[0] - before).norm() / before.norm()))
            tick(f"layer {number}")
    return stream, changes


@torch.no_grad()
def compare_logits(
    ours: tuple[StudentStream, WeightsReader], theirs: tuple[StudentStream, WeightsReader], epsilon: float
) -> LogitAgreement:
    """Return final norm and head of both checkpoints, compared in chunks of the vocabulary.

    Args:
        ours: The result's stream after its last layer, and its weights.
        theirs: The same of the parent.
        epsilon: Of the final norm.
    """
    normed = []
    for stream, reader in (ours, theirs):
        gain = reader.read_fp32(FINAL_NORM).to(stream.device)
        normed.append(nn.functional.rms_norm(stream.hidden[0], gain.shape, gain, epsilon))
    equal, difference, largest = True, 0.0, 0.0
    size = ours[1].specs[HEAD].shape[0]
    for start in range(0, size, VOCABULARY_CHUNK):
        logits = [
            nn.functional.linear(
                hidden,
                reader.read(HEAD, start, start + VOCABULARY_CHUNK).to(stream.device, torch.float32),
            )
            for hidden, (stream, reader) in zip(normed, (ours, theirs), strict=True)
        ]
        if not torch.equal(*logits):
            equal = False
            difference = max(difference, float((logits[0] - logits[1]).abs().max()))
        largest = max(largest, float(logits[1].abs().max()))
    tokens = normed[0].shape[0] * normed[0].shape[1]
    return LogitAgreement(equal, difference, largest, tokens)
