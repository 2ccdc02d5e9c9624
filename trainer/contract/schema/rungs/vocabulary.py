"""Rung `qwen3_0_6b_o200k`: the donor with the student's vocabulary."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from trainer.contract.schema.base import Frozen, PositiveInt
from trainer.contract.schema.rungs.rung import ConversionRecipe, HuggingFaceRecipe, Place, Rung


class VocabularySurgery(Frozen):
    """Donor vocabulary → o200k, by mergekit's tokensurgeon run as a program.

    Attributes:
        approximation_method: How a token that the donor lacks gets its row: from the `k` shared tokens that
            rebuild its row in the vocabulary donor (`omp`), from its `k` nearest neighbours there
            (`common_interpolation`), from the donor's pieces of its text (`subword`), or none of it.
        k: Atoms or neighbours.
        subword_method: How pieces combine.
        weight_scheme: Of the neighbours.
        cosine_similarity: Distance of the neighbours; Euclidean otherwise.
        prefix_match: Let a token that the donor lacks take the row of its longest prefix that it has.
        byte_match: Let `<0x..>` tokens match characters.
        batch_size: Tokens approximated together.
    """

    tool: Literal["mergekit-tokensurgeon"]
    approximation_method: Literal["omp", "common_interpolation", "subword", "mean", "zero"]
    k: PositiveInt
    subword_method: Literal["mean", "sum", "weighted_mean", "first_last"] = "mean"
    weight_scheme: Literal["distance_proportional", "barycentric", "least_squares"] = "distance_proportional"
    cosine_similarity: bool = False
    prefix_match: bool = False
    byte_match: bool = False
    batch_size: PositiveInt = 512


class VocabularyRecipe(HuggingFaceRecipe):
    """The donor with another vocabulary: a Hugging Face checkpoint from two.

    Attributes:
        vocabulary_hidden_size: Width of the embeddings of the input `vocabulary`.
    """

    step: Literal["vocabulary"] = "vocabulary"
    vocabulary_hidden_size: PositiveInt
    surgery: VocabularySurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.surgery.approximation_method == "omp" and self.surgery.k > self.vocabulary_hidden_size:
            raise ValueError(
                f"surgery.k = {self.surgery.k} atoms are more than the {self.vocabulary_hidden_size} "
                "dimensions of the vocabulary donor's embeddings; the fit would not be unique"
            )
        return self


class VocabularyRung(Rung):
    """The donor with the o200k vocabulary: a Hugging Face model whose geometry is the donor's."""

    RECIPE: ClassVar[type[ConversionRecipe]] = VocabularyRecipe
    NEEDS: ClassVar[tuple[str, ...]] = ("qwen3_0_6b", "gpt_oss_20b")

    surgery: VocabularySurgery

    def keys(self, place: Place) -> dict[str, Any]:
        """Return the keys of its recipe: it is made from two sources."""
        assert place.sources.gpt_oss_20b is not None  # one of NEEDS
        return {
            "source": "qwen3_0_6b",
            "donor": place.donor(),
            "vocabulary": "gpt_oss_20b",
            "vocabulary_hidden_size": place.sources.gpt_oss_20b.hidden_size,
            "vocab_size": place.sources.tokenizer.vocab_size,
        }
