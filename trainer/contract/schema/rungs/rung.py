"""What every rung and every recipe of a conversion has, and where a rung stands in its experiment."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from trainer.contract.differences import differences
from trainer.contract.schema.architecture import (
    Architecture,
    AttentionConfig,
    GrapeConfig,
    ModelConfig,
    MoeConfig,
    TpaConfig,
    check_geometry,
)
from trainer.contract.schema.base import (
    ConfigError,
    Count,
    Fraction,
    Frozen,
    Name,
    PositiveFloat,
    PositiveInt,
    plain,
)
from trainer.contract.schema.donor import Donor
from trainer.contract.schema.sources import Sources
from trainer.contract.schema.training import TrainingConfig
from trainer.contract.schema.words import ObjectiveName

Dtype = Literal["fp32", "bf16"]
GEOMETRY_TABLES = ("model", "attention", "tpa", "grape", "moe")


class InputMark:
    """Marks a recipe's key whose value is the name of one of the job's inputs."""


InputName = Annotated[Name, InputMark()]
"""Name of one of the job's inputs: an upstream asset, where the orchestrator asks for the job."""


class ConversionRecipe(Frozen):
    """The recipe of one conversion, all resolved; each rung has its own.

    Attributes:
        step: The word of the step: `trainer.surgery.<step>` makes it.
        source: Name of the job's input whose weights are converted.
    """

    step: str
    source: InputName


class DonorRecipe(ConversionRecipe):
    """A conversion of the donor.

    Attributes:
        donor: Geometry of the input.
    """

    donor: Donor


class HuggingFaceRecipe(DonorRecipe):
    """A conversion whose result is a Hugging Face checkpoint: the donor with another vocabulary.

    Attributes:
        vocabulary: Name of the job's input whose tokenizer and embeddings are the reference.
        vocab_size: Rows of the result, padding included.
    """

    vocabulary: InputName
    vocab_size: PositiveInt


class MegatronRecipe(ConversionRecipe):
    """A conversion whose result is a Megatron rung.

    Attributes:
        architecture: Geometry of the result.
        dtype: Storage type of the result; parameters that are fp32 in every model stay so.
    """

    architecture: Architecture
    dtype: Dtype


class RungRecipe(MegatronRecipe):
    """A conversion between two Megatron rungs.

    Attributes:
        parent: Geometry of the input.
        parent_dtype: Its storage type.
    """

    parent: Architecture
    parent_dtype: Dtype


def named_inputs(recipe: ConversionRecipe) -> dict[str, str]:
    """Return the names of inputs that a recipe has, by key."""
    return {
        key: getattr(recipe, key)
        for key, field in type(recipe).model_fields.items()
        if any(isinstance(item, InputMark) for item in field.metadata)
    }


def refuse(problems: list[str]) -> None:
    """Refuse what was found wrong, all at once.

    Raises:
        ValueError: There are problems.
    """
    if problems:
        raise ValueError("; ".join(problems))


def refuse_changes(recipe: RungRecipe, allowed: set[str]) -> None:
    """Refuse a result that differs from its parent in more than the step changes.

    Args:
        recipe: The recipe.
        allowed: Tables, or dotted keys, that may differ.

    Raises:
        ValueError: Naming every other key that differs, and both values.
    """
    changed = differences(plain(recipe.architecture), plain(recipe.parent))
    refuse(
        [
            f"architecture.{key}: {theirs!r} in the parent, {ours!r} here; this step does not change it"
            for key, (ours, theirs) in changed.items()
            if key not in allowed and key.split(".")[0] not in allowed
        ]
    )


@dataclass(frozen=True)
class Place:
    """Where a rung stands in its experiment: what its recipe is resolved from.

    Attributes:
        asset: Name of the rung.
        sources: Of the experiment.
        architecture: Geometry of the rung; None where it is the donor's.
        dtype: Its storage type.
        before: Name of the rung before it in this experiment.
        source: Checkpoint that it is made from: the rung before, healed where that is.
        parent: Geometry of the rung before; None where there is none or its geometry is the donor's.
        parent_dtype: Its storage type.
    """

    asset: str
    sources: Sources
    architecture: Architecture | None = None
    dtype: Dtype | None = None
    before: str | None = None
    source: str | None = None
    parent: Architecture | None = None
    parent_dtype: Dtype | None = None

    def between_rungs(self) -> dict[str, Any]:
        """Return the keys of a `RungRecipe`.

        Raises:
            ConfigError: There is no Megatron rung before this one.
        """
        if self.before is None:
            raise ConfigError(
                f"rungs.{self.asset}: has a surgery table, but this experiment has no rung before it to "
                "start from"
            )
        if self.parent is None or self.architecture is None:
            raise ConfigError(
                f"rungs.{self.asset}: is made from a dense student, but the rung before it is "
                f"{self.before}, which has the donor's geometry; put a rung in between"
            )
        return {
            "source": self.source,
            "architecture": plain(self.architecture),
            "dtype": self.dtype,
            "parent": plain(self.parent),
            "parent_dtype": self.parent_dtype,
        }

    def donor(self, **changes: Any) -> dict[str, Any]:
        """Return the donor's geometry, with some keys changed.

        Raises:
            ConfigError: The experiment has no donor.
        """
        if self.sources.qwen3_0_6b is None:
            raise ConfigError(f"rungs.{self.asset}: needs sources.qwen3_0_6b")
        return {name: getattr(self.sources.qwen3_0_6b, name) for name in Donor.model_fields} | changes


class Rung(Frozen):
    """A `[rungs.<asset>]` table.

    Attributes:
        RECIPE: What the rung is made by.
        NEEDS: Sources, beyond those that every experiment has, without which it cannot be made.
    """

    RECIPE: ClassVar[type[ConversionRecipe]]
    NEEDS: ClassVar[tuple[str, ...]] = ()

    surgery: Any = None

    def keys(self, place: Place) -> dict[str, Any]:
        """Return the keys of its recipe, apart from `step` and `surgery`.

        Raises:
            ConfigError: It cannot be made where it stands.
        """
        raise NotImplementedError


class Healing(Frozen):
    """The stabilising run after a surgery.

    Attributes:
        learning_rate: Peak rate; the other groups' rates keep their proportion to it.
        new_layers_only_steps: Steps before `steps` in which only inserted layers are trained.
        harmony_fraction: Share of conversations; the rest is healing text.
        objective: What is minimised: name of a module of `trainer.losses`.
    """

    steps: PositiveInt
    objective: ObjectiveName = "span_ce"
    learning_rate: PositiveFloat
    new_layers_only_steps: Count = 0
    harmony_fraction: Fraction = 0.2
    training: TrainingConfig


class RungConfig(Rung):
    """A Megatron rung: its geometry (`[rungs.defaults]` already merged in), surgery and healing."""

    model: ModelConfig
    attention: AttentionConfig
    tpa: TpaConfig
    grape: GrapeConfig
    moe: MoeConfig | None = None
    healing: Healing | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_geometry(self.model, self.attention, self.tpa, self.grape, self.moe)
        return self

    def keys(self, place: Place) -> dict[str, Any]:
        """Return the keys of its recipe: by default those of a step between two Megatron rungs."""
        return place.between_rungs()

    def new_layers(self, parent: "RungConfig") -> tuple[int, ...]:
        """1-based numbers of the layers that it has and its parent lacks.

        Raises:
            ValueError: The depths do not fit together.
        """
        return ()


class DenseRung(RungConfig):
    """A rung without experts."""

    @model_validator(mode="after")
    def _check_dense(self) -> Self:
        if self.moe is not None:
            raise ValueError("this rung is dense; a moe table belongs to rungs.vpmoe alone")
        return self
