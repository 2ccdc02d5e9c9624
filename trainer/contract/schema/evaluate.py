"""The recipe of an evaluation: which suites, on which checkpoints, by which protocol, all resolved."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import Frozen, Name, PositiveInt
from trainer.contract.schema.words import BackendName

Dtype = Literal["fp32", "bf16"]
SuiteName = Literal["core8", "ppl", "numeric", "harmony"]
Suites = Annotated[tuple[SuiteName, ...], Field(strict=False, min_length=1)]


class Generation(Frozen):
    """Sampling for the Harmony-validity check."""

    prompts: PositiveInt
    max_new_tokens: PositiveInt
    greedy: bool


class Evaluation(Frozen):
    """What every checkpoint is measured on.

    Attributes:
        max_len: Longest scored sequence in tokens, the same for every checkpoint; longer ones lose their
            beginning, which is counted. By default 2048, or what the shortest rung can read.
        dtype: Type of weights and activations while measuring.
        backend: Backend that our own checkpoints are measured with; no fusion is asked of it.
        ppl_tokens: Perplexity is measured on this many first tokens of each held-out split.
    """

    suites: Suites
    max_len: PositiveInt | None = None
    dtype: Dtype = "fp32"
    backend: BackendName = "reference"
    ppl_tokens: PositiveInt
    generation: Generation


class Core8Protocol(Frozen):
    """Which items are asked, and which are shown as examples.

    Attributes:
        seed: Shuffles a task's rows before the first `max_per_task` of them are kept.
        max_per_task: Kept rows, both asked and drawn from as examples.
        few_shot_seed: Item `i` draws its examples with the seed `few_shot_seed + i`.
    """

    seed: int
    max_per_task: PositiveInt
    few_shot_seed: int = 1234


class MegatronCheckpoint(Frozen):
    """One of our checkpoints.

    Attributes:
        architecture: What it must be built from; None takes what its own config says.
    """

    format: Literal["megatron"] = "megatron"
    architecture: Architecture | None = None


class HuggingFaceCheckpoint(Frozen):
    """A Hugging Face directory.

    Attributes:
        geometry: Keys of its `config.json` and the values that they must have; None checks nothing.
    """

    format: Literal["huggingface"] = "huggingface"
    geometry: dict[str, Any] | None = None


Checkpoint = Annotated[MegatronCheckpoint | HuggingFaceCheckpoint, Field(discriminator="format")]


class EvaluateRecipe(Frozen):
    """One evaluation, complete: nothing that can change its numbers is decided anywhere else.

    Attributes:
        checkpoints: The objects to measure, each the name of an input of the job.
        core8: Protocol of the `core8` suite; required with it.
    """

    checkpoints: Annotated[dict[Name, Checkpoint], Field(min_length=1)]
    suites: Suites
    max_len: PositiveInt
    dtype: Dtype
    backend: BackendName = "reference"
    ppl_tokens: PositiveInt
    generation: Generation
    core8: Core8Protocol | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.suites)) != len(self.suites):
            raise ValueError(f"suites = {list(self.suites)} names a suite twice")
        if "core8" in self.suites and self.core8 is None:
            raise ValueError("suites has 'core8', but there is no core8 table (sources.core8)")
        for name, checkpoint in self.checkpoints.items():
            if isinstance(checkpoint, MegatronCheckpoint) and checkpoint.architecture is not None:
                longest = checkpoint.architecture.attention.max_sequence_length
                if self.max_len > longest:
                    raise ValueError(
                        f"max_len = {self.max_len} is more than attention.max_sequence_length = {longest} of "
                        f"{name}; every checkpoint is measured with the same max_len, so lower it"
                    )
        return self
