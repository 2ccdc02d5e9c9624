"""The recipe of one conversion: what it starts from, what it makes and by which method, all resolved."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from trainer.contract.depth import BLOCK_LAYERS, layer_origins
from trainer.contract.differences import differences
from trainer.contract.pattern import LayerKind, layer_pattern
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError, Frozen, Name, PositiveInt, parse, plain
from trainer.contract.schema.donor import Donor
from trainer.contract.schema.rungs import (
    DenseSurgery,
    DepthSurgery,
    MoeSurgery,
    MorphSurgery,
    VocabularySurgery,
)

Dtype = Literal["fp32", "bf16"]


class _Recipe(Frozen):
    """What every conversion has.

    Attributes:
        source: Name of the job's input whose weights are converted.
    """

    source: Name


class VocabularyRecipe(_Recipe):
    """The donor with another vocabulary: a Hugging Face checkpoint from two.

    Attributes:
        vocabulary: Name of the job's input whose tokenizer and embeddings are the reference.
        vocabulary_hidden_size: Width of that input's embeddings.
        vocab_size: Rows of the result, padding included.
    """

    step: Literal["vocabulary"] = "vocabulary"
    donor: Donor
    vocabulary: Name
    vocabulary_hidden_size: PositiveInt
    vocab_size: PositiveInt
    surgery: VocabularySurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.surgery.approximation_method == "omp" and self.surgery.k > self.vocabulary_hidden_size:
            raise ValueError(
                f"surgery.k = {self.surgery.k} atoms are more than the {self.vocabulary_hidden_size} "
                "dimensions of the vocabulary donor's embeddings; the fit would not be unique"
            )
        return self


class _MegatronRecipe(_Recipe):
    """A conversion whose result is a Megatron rung.

    Attributes:
        architecture: Geometry of the result.
        dtype: Storage type of the result; parameters that are fp32 in every model stay so.
    """

    architecture: Architecture
    dtype: Dtype


class DenseRecipe(_MegatronRecipe):
    """Donor → `vpdense0_5_28`: the donor's attention, heads pooled, and its FFN with ReLU².

    Attributes:
        text: Name of the job's input with calibration and check text.
    """

    step: Literal["vpdense"] = "vpdense"
    donor: Donor
    text: Name
    surgery: DenseSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        donor, model, attention = self.donor, self.architecture.model, self.architecture.attention
        pairs = [
            ("vocab_size", self.architecture.vocab_size, donor.vocab_size),
            ("model.num_layers", model.num_layers, donor.num_layers),
            ("model.hidden_size", model.hidden_size, donor.hidden_size),
            ("model.head_dim", model.head_dim, donor.head_dim),
            ("model.norm_epsilon", model.norm_epsilon, donor.rms_norm_eps),
            ("grape.rotary_base", self.architecture.grape.rotary_base, donor.rope_theta),
            (
                "attention.position_embedding_type",
                attention.position_embedding_type,
                "rope",
            ),
            ("model.softmax_type", model.softmax_type, "vanilla"),
            ("model.value_residual", model.value_residual, False),
            ("model.qk_layernorm", model.qk_layernorm, True),
        ]
        problems = [
            f"{key} = {found!r}, but the donor has {theirs!r}"
            for key, found, theirs in pairs
            if found != theirs
        ]
        for key, ours, theirs in (
            ("model.num_attention_heads", model.num_attention_heads, donor.num_attention_heads),
            ("model.num_query_groups", model.num_query_groups, donor.num_key_value_heads),
        ):
            if theirs % ours:
                problems.append(f"{key} = {ours} does not divide the donor's {theirs} heads into equal pools")
        if model.ffn_hidden_size > donor.intermediate_size:
            problems.append(
                f"model.ffn_hidden_size = {model.ffn_hidden_size} is wider than the donor's FFN of "
                f"{donor.intermediate_size}"
            )
        if self.architecture.moe is not None:
            problems.append("moe: the result of this step is dense")
        if self.surgery.ffn_method == "A+lsq" and not model.add_bias_linear:
            problems.append(
                "surgery.ffn_method = 'A+lsq' refits a bias; it needs model.add_bias_linear = true"
            )
        _refuse(problems)
        return self


class _RungRecipe(_MegatronRecipe):
    """A conversion between two Megatron rungs.

    Attributes:
        parent: Geometry of the input.
        parent_dtype: Its storage type.
    """

    parent: Architecture
    parent_dtype: Dtype

    def _refuse_changes(self, allowed: set[str]) -> None:
        changed = differences(plain(self.architecture), plain(self.parent))
        _refuse(
            [
                f"architecture.{key}: {theirs!r} in the parent, {ours!r} here; this step does not change it"
                for key, (ours, theirs) in changed.items()
                if key not in allowed and key.split(".")[0] not in allowed
            ]
        )


class MorphRecipe(_RungRecipe):
    """`vpdense0_5_28` → `vpdense_28`: the student's attention in place of the donor's.

    Attributes:
        text: Name of the job's input with calibration and check text.
    """

    step: Literal["morph"] = "morph"
    text: Name
    surgery: MorphSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._refuse_changes(
            {"attention", "tpa", "grape"}
            | {f"model.{name}" for name in ("softmax_type", "value_residual")}
            | {f"model.value_residual_{name}" for name in ("init", "eps")}
        )
        return self


class ExpandRecipe(_RungRecipe):
    """`vpdense_28` → `vpdense_80`: whole blocks inserted, the function unchanged."""

    step: Literal["expand"] = "expand"
    surgery: DepthSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._refuse_changes({"model.num_layers"})
        if self.parent.moe is not None:
            raise ValueError("parent.moe: found experts; depth is expanded while every FFN is dense")
        ours, theirs = _kinds(self.architecture), _kinds(self.parent)
        origins = layer_origins(self.parent.model.num_layers, self.architecture.model.num_layers)
        for number, origin in enumerate(origins, start=1):
            if ours[number - 1] != theirs[origin.source - 1]:
                raise ValueError(
                    f"layer {number} would be {ours[number - 1]} and take the tensors of layer "
                    f"{origin.source}, which is {theirs[origin.source - 1]}; the attention pattern must "
                    f"repeat every block of {BLOCK_LAYERS} layers"
                )
        return self


def _kinds(architecture: Architecture) -> tuple[LayerKind, ...]:
    attention = architecture.attention
    return layer_pattern(
        architecture.model.num_layers, attention.window_size, attention.window_attn_skip_freq
    )


class UpcycleRecipe(_RungRecipe):
    """`vpdense_80` → `vpmoe`: each dense FFN becomes a shared expert and routed ones."""

    step: Literal["upcycle"] = "upcycle"
    surgery: MoeSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._refuse_changes({"moe", "model.ffn_hidden_size", "model.dense_ffn_hidden_size"})
        moe = self.architecture.moe
        if self.parent.moe is not None or moe is None:
            raise ValueError("moe: upcycling needs a dense parent and a result with a moe table")
        width, routed = _dense_width(self.parent), self.architecture.model.ffn_hidden_size
        first = _dense_width(self.architecture)
        problems = []
        if not moe.shared_expert or moe.shared_expert_size != width:
            problems.append(
                f"moe.shared_expert = {moe.shared_expert} of size {moe.shared_expert_size}, but the parent's "
                f"FFN is {width} wide and becomes the shared expert; they must be equal"
            )
        if width % routed:
            problems.append(
                f"model.ffn_hidden_size = {routed} does not divide the parent's {width} neurons into slices"
            )
        if moe.first_layer_dense and first > width:
            problems.append(
                f"model.dense_ffn_hidden_size = {first} is wider than the parent's FFN of {width}"
            )
        if moe.first_layer_dense and first < width and self.surgery.layer1 != "shrink":
            problems.append(
                f"model.dense_ffn_hidden_size = {first} is narrower than the parent's FFN of {width}; set "
                f"it to {width} to keep layer 1, or surgery.layer1 = 'shrink' to cut it"
            )
        _refuse(problems)
        return self


def _dense_width(architecture: Architecture) -> int:
    return architecture.model.dense_ffn_hidden_size or architecture.model.ffn_hidden_size


ConvertRecipe = VocabularyRecipe | DenseRecipe | MorphRecipe | ExpandRecipe | UpcycleRecipe
MegatronRecipe = DenseRecipe | MorphRecipe | ExpandRecipe | UpcycleRecipe

RECIPES: dict[str, type[ConvertRecipe]] = {
    "vocabulary": VocabularyRecipe,
    "vpdense": DenseRecipe,
    "morph": MorphRecipe,
    "expand": ExpandRecipe,
    "upcycle": UpcycleRecipe,
}
"""The union's members by their `step`."""


def parse_convert_recipe(raw: Mapping[str, Any], *, origin: str = "recipe") -> ConvertRecipe:
    """Validate the recipe of a `convert` job.

    Raises:
        ConfigError: The step is missing or unknown, or a key of that step's recipe is.
    """
    step = raw.get("step")
    allowed = ", ".join(map(repr, RECIPES))
    if step is None:
        raise ConfigError(f"step: missing; allowed: {allowed}", origin=origin)
    if step not in RECIPES:
        raise ConfigError(f"step: found {step!r}; allowed: {allowed}", origin=origin)
    return parse(RECIPES[step], raw, origin=origin)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))
