"""Checks of the sources and the data group: thin adapters over the audits of the libraries."""

from collections.abc import Mapping

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.verdict import Verdict

_SAMPLE = 64
"""Rows that are generated again, and conversations that openai-harmony renders again, for every version."""


@check("tokenizer_agrees")
def tokenizer_agrees(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Check the sha256 of the ranks, the special ids, and that tiktoken and openai-harmony agree."""
    from vpmoe_assets.harmony import audit

    return audit.tokenizer_agrees(item.payload)


@check("files_match_manifest")
def source_files(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Every file has the sha256 and size that its manifest states, and no other file is there."""
    from vpmoe_assets.file_audit import source_files_match

    return source_files_match(item.payload, item.manifest)


def generated_rows(seed: int, rows: int) -> Check:
    """Return the check that the rows are those of the generator, in their order.

    Of generated rows a manifest says only what their writer found; so they are read and generated again.
    """

    @check("rows_as_generated")
    def generated(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """The files hold all rows of the experiment's seed, in order; a sample is generated again."""
        from vpmoe_assets.generated.audit import rows_as_generated

        return rows_as_generated(item.payload, seed=seed, rows=rows, sample=_SAMPLE)

    return generated


@check("manifest_matches_shards")
def harmony_manifest(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the shards are exactly those of the manifest; skipped rows are counted."""
    from vpmoe_assets.harmony import audit

    return audit.harmony_manifest_matches(item.payload, item.manifest)


@check("manifest_matches_shards")
def kd_manifest(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the files are exactly those of the manifest, and rows and tokens add up."""
    from vpmoe_assets.harmony import audit

    return audit.kd_manifest_matches(item.payload, item.manifest)


@check("arrays_aligned")
def kd_aligned(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Tokens, loss mask and span have the same documents and keep the format's invariants."""
    from vpmoe_assets.harmony import audit

    return audit.arrays_aligned(item.payload, item.manifest)


@check("golden_conversation")
def golden_conversation(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the reference conversation renders to its known 132 tokens."""
    from vpmoe_assets.harmony import audit

    return audit.golden_conversation(inputs["o200k_tokenizer"].payload)


def kd_sample(seed: int) -> Check:
    """Return the check that openai-harmony renders a seeded sample to exactly what the shards hold."""

    @check("sample_renders_alike")
    def sample(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """openai-harmony renders a seeded sample again; the shards hold exactly that."""
        from vpmoe_assets.harmony import audit

        return audit.sample_renders_alike(
            item.payload,
            item.manifest,
            inputs["synth_harmony"].payload,
            inputs["synth_harmony"].manifest,
            inputs["o200k_tokenizer"].payload,
            seed=seed,
            sample=_SAMPLE,
        )

    return sample


@check("split_rule")
def kd_split(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the hash of every synth_id puts it where it stands."""
    from vpmoe_assets.harmony import audit

    harmony = inputs["synth_harmony"]
    return audit.split_rule_holds(item.manifest, harmony.payload, harmony.manifest)


@check("truncation_counts", blocking=False)
def kd_truncation(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """How many conversations were cut or dropped for their length; a warning above one in two."""
    counts = {name: split["counts"] for name, split in item.manifest["splits"].items()}
    dropped = sum(
        value for split in counts.values() for name, value in split.items() if name.startswith("drop_")
    )
    rows = dropped + sum(split["kept"] for split in counts.values())
    touched = dropped + sum(split["truncated_analysis"] for split in counts.values())
    return Verdict(touched <= rows / 2, f"{touched} of {rows} conversations were cut or dropped", counts)


@check("documents_aligned")
def healing_aligned(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Every document ends with its only EOD, ids lie in the vocabulary, counts are the manifest's."""
    from vpmoe_assets.text.audit import text_aligned

    return text_aligned(item.payload, item.manifest)


def healing_budget(max_tokens: int) -> Check:
    """Return the check that the token budget is kept."""

    @check("token_budget")
    def budget(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """The shards have no more tokens than the budget, counted in their files."""
        from vpmoe_assets.text.audit import tokens_within_budget

        return tokens_within_budget(item.payload, max_tokens)

    return budget
