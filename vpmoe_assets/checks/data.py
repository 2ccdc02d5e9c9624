"""Checks of the sources and the data group: thin adapters over the audits of the libraries."""

from collections.abc import Mapping
from typing import Any

from vpmoe_assets.build import Build, Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.file_audit import source_files_match
from vpmoe_assets.harmony import audit
from vpmoe_assets.text.audit import text_aligned
from vpmoe_assets.verdict import Verdict

_SAMPLE = 64
"""Conversations that openai-harmony renders again in every build."""


def _manifest(build: Build) -> dict[str, Any]:
    import orjson

    return dict(orjson.loads(build.work.manifest.read_bytes()))


@check("tokenizer_agrees")
def tokenizer_agrees(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Check the sha256 of the ranks, the special ids, and that tiktoken and openai-harmony agree."""
    return audit.tokenizer_agrees(build.payload)


@check("files_match_manifest")
def source_files(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Every file has the sha256 and size that its manifest states, and no other file is there."""
    return source_files_match(build.payload, _manifest(build))


@check("manifest_matches_shards")
def harmony_manifest(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the shards are exactly those of the manifest; skipped rows are counted."""
    return audit.harmony_manifest_matches(build.payload, _manifest(build))


@check("manifest_matches_shards")
def kd_manifest(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the files are exactly those of the manifest, and rows and tokens add up."""
    return audit.kd_manifest_matches(build.payload, _manifest(build))


@check("arrays_aligned")
def kd_aligned(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Tokens, loss mask and span have the same documents and keep the format's invariants."""
    return audit.arrays_aligned(build.payload, _manifest(build))


@check("golden_conversation")
def golden_conversation(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the reference conversation renders to its known 132 tokens."""
    return audit.golden_conversation(inputs["o200k_tokenizer"].payload)


def kd_sample(seed: int) -> Check:
    """Return the check that openai-harmony renders a seeded sample to exactly what the shards hold."""

    @check("sample_renders_alike")
    def sample(build: Build, inputs: Mapping[str, Published]) -> Verdict:
        """openai-harmony renders a seeded sample again; the shards hold exactly that."""
        return audit.sample_renders_alike(
            build.payload,
            _manifest(build),
            inputs["synth_harmony"].payload,
            inputs["synth_harmony"].manifest,
            inputs["o200k_tokenizer"].payload,
            seed=seed,
            sample=_SAMPLE,
        )

    return sample


@check("split_rule")
def kd_split(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Check that the hash of every synth_id puts it where it stands."""
    harmony = inputs["synth_harmony"]
    return audit.split_rule_holds(_manifest(build), harmony.payload, harmony.manifest)


@check("truncation_counts", blocking=False)
def kd_truncation(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """How many conversations were cut or dropped for their length; a warning above one in two."""
    counts = {name: split["counts"] for name, split in _manifest(build)["splits"].items()}
    rows = sum(split["kept"] for split in counts.values())
    touched = sum(
        value
        for split in counts.values()
        for name, value in split.items()
        if name == "truncated_analysis" or name.startswith("drop_")
    )
    return Verdict(touched <= rows / 2, f"{touched} of {rows} conversations were cut or dropped", counts)


@check("documents_aligned")
def healing_aligned(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Every document ends with its only EOD, ids lie in the vocabulary, counts are the manifest's."""
    return text_aligned(build.payload, _manifest(build))


def healing_budget(max_tokens: int) -> Check:
    """Return the check that the token budget is kept."""

    @check("token_budget")
    def budget(build: Build, inputs: Mapping[str, Published]) -> Verdict:
        """Check that the corpus has no more tokens than its budget."""
        tokens = sum(split["tokens"] for split in _manifest(build)["splits"].values())
        return Verdict(
            max_tokens < 0 or tokens <= max_tokens,
            f"{tokens} tokens, budget {'none' if max_tokens < 0 else max_tokens}",
            {"tokens": tokens},
        )

    return budget
