"""The donor with the student's vocabulary: o200k rows in place of Qwen3's.

mergekit's tokensurgeon makes the rows. Tokens of both vocabularies keep the donor's row bit for bit, the
others are rebuilt by the method of the experiment, rows without a token are the mean row. Everything else is
the donor's, in Hugging Face format.
"""

from trainer.contract.donor import HF_EMBEDDING, HF_HEAD, donor_shapes
from trainer.contract.schema.rungs.vocabulary import VocabularyRecipe
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.rungs import copied, donor_weights_complete, measured
from vpmoe_assets.rung import RungAsset


def checks(recipe: VocabularyRecipe) -> list[Check]:
    """Return the checks of the rung."""
    rows = (
        f"The embedding has {recipe.vocab_size} rows, as the configuration says; nothing else in it changed."
    )
    rest = donor_shapes(recipe.donor).keys() - {HF_EMBEDDING, HF_HEAD}
    return [
        donor_weights_complete(
            recipe.donor.model_copy(update={"vocab_size": recipe.vocab_size}), recipe.source
        ),
        copied(
            "rest_copied",
            "Every tensor but the embeddings has the donor's bytes.",
            recipe.source,
            {name: name for name in sorted(rest)},
        ),
        measured("vocabulary_rows", rows, blocking=True),
        measured(
            "shared_tokens_copied",
            "Tokens of both vocabularies have the donor's very row, bit for bit.",
            blocking=True,
        ),
        measured("new_rows", "A sample of the new rows, computed again.", blocking=False),
        measured("padding_rows", "Rows without a token are the mean row.", blocking=False),
        measured("numeric_prompts", "Numbers have their known o200k ids and decode back.", blocking=False),
    ]


RUNG = RungAsset(checks=checks, kinds=frozenset({"huggingface", "safetensors"}))
