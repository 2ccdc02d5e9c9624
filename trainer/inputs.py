"""From a job to its open data sets; what the installed trainer cannot do is refused here, before any work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, Job, TrainRecipe
from trainer.data.indexed import SpanDocuments
from trainer.data.kd import PackedDataset

KD_INPUT = "synth_kd_v1"


@dataclass(frozen=True)
class TrainingData:
    """The open splits of a run's conversation data.

    Attributes:
        train: Samples to train on.
        valid: Samples to measure on.
        manifest: The data set's manifest.
    """

    train: PackedDataset
    valid: PackedDataset
    manifest: dict[str, Any]


def open_data(job: Job, recipe: TrainRecipe, *, cache_dir: Path) -> TrainingData:
    """Opens the conversation data among a job's inputs and checks that it is meant for this model.

    Args:
        job: The job; needs the input `synth_kd_v1`.
        recipe: Its recipe.
        cache_dir: Where packings are stored; may be shared by ranks.

    Raises:
        ConfigError: The input is missing, or its vocabulary is not the model's.
        DataError: The data are damaged.
    """
    if KD_INPUT not in job.inputs:
        raise ConfigError(
            f"inputs: {KD_INPUT} is missing; a training job needs it, found {', '.join(job.inputs) or 'none'}"
        )
    root = Path(job.inputs[KD_INPUT].path)
    splits = {
        split: PackedDataset(
            SpanDocuments(root, split),
            seq_len=recipe.seq_len,
            block=recipe.pack_block,
            seed=job.seed,
            cache_dir=cache_dir,
        )
        for split in ("train", "valid")
    }
    manifest = splits["train"].documents.manifest
    vocabulary, ours = manifest["tokenizer"]["vocab_size"], recipe.architecture.vocab_size
    if vocabulary != ours:
        raise ConfigError(
            f"{root} was tokenised for a vocabulary of {vocabulary}, the model has vocab_size = {ours}; they "
            "must be equal"
        )
    return TrainingData(splits["train"], splits["valid"], manifest)


def refuse_unavailable(recipe: TrainRecipe) -> None:
    """Refuses what a recipe may ask for and this trainer does not do, rather than training something else.

    Raises:
        ConfigError: Naming the key, its value and the remedy.
    """
    kd = recipe.kd
    if kd is None:
        raise ConfigError(
            "recipe.kd is missing: this trainer needs the span weights of the conversation loss"
        )
    asked = {
        "recipe.harmony_fraction": (recipe.harmony_fraction, 1.0),
        "recipe.new_layers_only_steps": (recipe.new_layers_only_steps, 0),
        "recipe.scored_fraction": (recipe.scored_fraction, None),
        "recipe.rollouts": (recipe.rollouts, None),
        "recipe.kd.kl_weight": (kd.kl_weight, None),
        "recipe.kd.rescored": (kd.rescored, None),
    }
    for key, (found, only) in asked.items():
        if found != only:
            raise ConfigError(f"{key} = {found!r}: this trainer has only {key} = {only!r}; set it so")
