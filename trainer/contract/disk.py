"""What a training run writes: resume checkpoints (as many as lie there at once), rollouts, weights."""

from dataclasses import dataclass

from trainer.contract.memory import WIDTHS
from trainer.contract.parameters import count_parameters, parameters
from trainer.contract.rounds import round_size
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.training import TrainingConfig, TrainRecipe

DRIFT_STEPS = 2
"""The resume check repeats this many steps from the end of a run."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on disk.

    Attributes:
        checkpoint: One resume checkpoint: weights, master weights and optimizer state, whatever the layout.
        checkpoints: How many of them lie there at the most, the one that is being written included.
        weights: The published weights.
        rollouts: The rounds of an on-policy run, all of which are kept; none is longer than it may be.
    """

    checkpoint: int
    checkpoints: int
    weights: int
    rollouts: int = 0

    @property
    def work_dir(self) -> int:
        """Bytes of all checkpoints and rollouts."""
        return self.checkpoint * self.checkpoints + self.rollouts

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.work_dir + self.weights

    def as_dict(self) -> dict[str, int]:
        """Return the plan with its sum, for JSON."""
        return {
            "checkpoint": self.checkpoint,
            "checkpoints": self.checkpoints,
            "weights": self.weights,
            **({"rollouts": self.rollouts} if self.rollouts else {}),
            "total": self.total,
        }


def disk_plan(recipe: TrainRecipe, *, verify_resume: bool = True) -> DiskPlan:
    """Plan the disk of a run from its first step to its last.

    Args:
        recipe: The run.
        verify_resume: Whether the checkpoint that the resume check starts from is kept.
    """
    arch, training = recipe.architecture, recipe.training
    drift = max(0, recipe.steps - DRIFT_STEPS) if verify_resume else None
    return DiskPlan(
        checkpoint=checkpoint_bytes(arch, training),
        checkpoints=most_checkpoints(recipe.steps, training, drift),
        weights=weight_bytes(arch, training),
        rollouts=rollout_bytes(recipe),
    )


def rollout_bytes(recipe: TrainRecipe) -> int:
    """Bytes of all rounds of rollouts, where none ends before it must: 12 a token, 22 a rollout."""
    if recipe.rollouts is None:
        return 0
    terms = recipe.rollouts
    each = 12 * terms.max_new_tokens + 22
    return recipe.steps * round_size(terms.buffer_size, terms.delay) * each


def weight_bytes(arch: Architecture, training: TrainingConfig) -> int:
    """Bytes of all weights and persistent buffers."""
    width = WIDTHS[training.dtype]
    stored = sum(entry.elements * (4 if entry.float32 else width) for entry in parameters(arch))
    return stored + 4 * count_parameters(arch).expert_bias_entries


def checkpoint_bytes(arch: Architecture, training: TrainingConfig) -> int:
    """Bytes of the tensors of one resume checkpoint."""
    width, settings = WIDTHS[training.dtype], training.optimizer
    total = weight_bytes(arch, training)
    for entry in parameters(arch):
        if width < 4 and not entry.float32:
            total += 4 * entry.elements  # master weight
        if settings.name == "normuon" and entry.kind == "matrices":
            total += WIDTHS[settings.momentum_dtype] * entry.elements + 4 * entry.elements // entry.shape[-1]
        elif settings.name != "sgd":
            total += 8 * entry.elements
    return total


def most_checkpoints(steps: int, training: TrainingConfig, drift_from: int | None) -> int:
    """Return how many checkpoints lie on the disk at once, at the most.

    Saved are every `save_interval`-th step, the one that the resume check starts from, and the last; the
    oldest goes when the new one is whole.

    Args:
        steps: Of the run.
        training: Cadence and retention.
        drift_from: Step that the resume check starts from; None without a check.
    """
    interval, last, every = training.save_interval, training.keep_last, training.keep_every
    saves = set(range(interval, steps + 1, interval)) | {steps}
    if drift_from is not None:
        saves.add(drift_from)
    kept: list[int] = []
    most = 0
    for step in sorted(saves):
        kept.append(step)
        most = max(most, len(kept))
        stay = set(kept[-last:]) | {drift_from}
        kept = [old for old in kept if old in stay or (every and old % every == 0)]
    return most
