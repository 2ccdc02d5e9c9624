"""From a job to its open data sets; what the installed trainer cannot do is refused here, before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from trainer.contract.kinds import CONVERSATIONS, ROLLOUTS, SCORED, TEXT
from trainer.contract.mix import mix_of
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.data.indexed import SpanDocuments, read_manifest
from trainer.data.kd import PackedDataset
from trainer.data.sampler import SampleSource
from trainer.data.text import TextDataset, TextDocuments

KD_INPUT = "synth_kd_v1"
TEACHER_INPUT = "teacher"
TOPK_INPUT = "teacher_topk"
TEXT_INPUT = "healing_text_v1"
INPUT_OF = {CONVERSATIONS: KD_INPUT, TEXT: TEXT_INPUT, SCORED: KD_INPUT}
"""Name, among a job's inputs, of each kind of samples."""
LIVE_KINDS = (ROLLOUTS,)
"""Kinds of samples that no data set holds; see `trainer.data.live`."""
PLACE_OF = INPUT_OF | {SCORED: "scored", ROLLOUTS: "rollouts"}
"""Name, in a resume checkpoint, of the place of a run in each kind of samples."""
SCORED_INPUTS = "trainer.train.scored_inputs"
"""Imported by name where a recipe asks for it: other runs neither load nor consist of what reads a store."""


class Split(SampleSource, Protocol):
    """One split of a data set, as samples."""

    def fill_ratio(self, epoch: int) -> float:
        """Share of an epoch's positions that hold document tokens."""

    def describe(self, epoch: int, index: int) -> str:
        """Names a sample and what is in it, for a person."""


@dataclass(frozen=True)
class DataPart:
    """The open splits of one kind of samples.

    Attributes:
        train: Samples to train on.
        valid: Samples to measure on.
        share: Share of the run's samples that are of this kind.
        manifest: The data set's manifest.
    """

    train: Split
    valid: Split
    share: float
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """The open data of a run.

    Attributes:
        parts: By kind, those of its kinds of samples that a data set holds.
        store: Manifest of the top-K store that scored samples come with.
    """

    parts: Mapping[str, DataPart]
    store: Mapping[str, Any] | None = None

    def num_samples(self) -> dict[str, int]:
        """Training samples in the first epoch of each kind."""
        return {name: part.train.num_samples(0) for name, part in self.parts.items()}

    def fill_ratio(self) -> float:
        """Share of positions that hold document tokens, over the kinds of data sets as they are mixed."""
        filled = sum(part.share * part.train.fill_ratio(0) for part in self.parts.values())
        held = sum(part.share for part in self.parts.values())
        return filled if abs(held - 1.0) < 1e-9 else filled / held


def open_data(job: Job, recipe: TrainRecipe, *, cache_dir: Path) -> TrainingData:
    """Open the data among a job's inputs that its recipe mixes, and check that they are for this model.

    Args:
        job: The job; needs the input `synth_kd_v1` where the recipe mixes conversations, `teacher_topk` where
            it has the table `scored`, and `healing_text_v1` where `harmony_fraction` is below 1.
        recipe: Its recipe.
        cache_dir: Where packings are stored; may be shared by ranks.

    Raises:
        ConfigError: An input is missing, its vocabulary is not the model's, or two inputs are of different
            tokenizers.
        DataError: The data are damaged.
        StoreError: The top-K store is damaged, or is not the one that the recipe and the data ask for.
    """
    parts: dict[str, DataPart] = {}
    store: Mapping[str, Any] | None = None
    for kind, share in mix_of(recipe).shares.items():
        if kind in LIVE_KINDS:
            continue
        root = input_root(job, recipe, INPUT_OF[kind])
        if kind == SCORED:
            parts[kind], store = import_module(SCORED_INPUTS).open_scored(job, recipe, share, cache_dir)
        else:
            opened = _conversations if kind == CONVERSATIONS else _text
            parts[kind] = opened(root, recipe, job.seed, share, cache_dir)
        _check_vocabulary(root, parts[kind].manifest, recipe.architecture.vocab_size)
    tokenizers = {part.manifest["tokenizer"]["model_sha256"] for part in parts.values()}
    if len(tokenizers) > 1:
        named = {INPUT_OF[kind]: part.manifest["tokenizer"]["model_sha256"] for kind, part in parts.items()}
        raise ConfigError(
            f"inputs were tokenised with different ranks: {named}; build them with one tokenizer"
        )
    return TrainingData(parts, store)


def input_root(job: Job, recipe: TrainRecipe, name: str) -> Path:
    """Return where an input is that a recipe needs.

    Args:
        job: The job.
        recipe: Its recipe.
        name: Of the input.

    Raises:
        ConfigError: The job lacks it.
    """
    if name not in job.inputs:
        raise ConfigError(
            f"inputs: {name} is missing; a training job with recipe.{_asked(recipe)} needs it, "
            f"found {', '.join(job.inputs) or 'none'}"
        )
    return Path(job.inputs[name].path)


def _asked(recipe: TrainRecipe) -> str:
    """Name the key that decides which kinds of samples a recipe mixes."""
    asked = [key for key in ("scored", "rollouts") if getattr(recipe, key) is not None]
    return asked[0] if asked else f"harmony_fraction = {recipe.harmony_fraction}"


def _conversations(root: Path, recipe: TrainRecipe, seed: int, share: float, cache_dir: Path) -> DataPart:
    def split(name: str) -> PackedDataset:
        documents = SpanDocuments(root, name)
        return PackedDataset(
            documents, seq_len=recipe.seq_len, block=recipe.pack_block, seed=seed, cache_dir=cache_dir
        )

    manifest = read_manifest(root, SpanDocuments.SCHEMA)
    return DataPart(split("train"), split("valid"), share, manifest)


def _text(root: Path, recipe: TrainRecipe, seed: int, share: float, cache_dir: Path) -> DataPart:
    train, valid = (
        TextDataset(TextDocuments(root, name), seq_len=recipe.seq_len, seed=seed)
        for name in ("train", "valid")
    )
    return DataPart(train, valid, share, train.documents.manifest)


def _check_vocabulary(root: Path, manifest: Mapping[str, Any], ours: int) -> None:
    vocabulary = manifest["tokenizer"]["vocab_size"]
    if vocabulary != ours:
        raise ConfigError(
            f"{root} was tokenised for a vocabulary of {vocabulary}, the model has vocab_size = {ours}; they "
            "must be equal"
        )
