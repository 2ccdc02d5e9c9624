"""Checks of the sources and the data group: thin adapters over the audits of the harmony library."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vpmoe_assets.checks.check import Check, Verdict
from vpmoe_assets.harmony import audit

if TYPE_CHECKING:
    from vpmoe_assets.assets.making import Build, Published

_SAMPLE = 64
"""Conversations that openai-harmony renders again in every build."""


def _check(name: str, *, blocking: bool = True) -> Callable[[Callable[..., audit.Outcome]], Check]:
    """Make a `Check` of a function; its docstring is what the UI says of it."""

    def decorate(function: Callable[..., audit.Outcome]) -> Check:
        def run(build: "Build", inputs: Mapping[str, "Published"]) -> Verdict:
            outcome = function(build, inputs)
            return outcome.passed, outcome.description, outcome.metadata

        return Check(name, run, blocking=blocking, description=(function.__doc__ or "").strip())

    return decorate


def _manifest(build: "Build") -> dict[str, Any]:
    import orjson

    return dict(orjson.loads(build.work.manifest.read_bytes()))


@_check("tokenizer_agrees")
def TOKENIZER_AGREES(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Check the sha256 of the ranks, the special ids, and that tiktoken and openai-harmony agree."""
    return audit.tokenizer_agrees(build.payload)


@_check("files_match_manifest")
def SOURCE_FILES(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Every file has the sha256 and size that its manifest states, and no other file is there."""
    return audit.source_files_match(build.payload, _manifest(build))


@_check("manifest_matches_shards")
def HARMONY_MANIFEST(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Check that the shards are exactly those of the manifest; skipped rows are counted."""
    return audit.harmony_manifest_matches(build.payload, _manifest(build))


@_check("manifest_matches_shards")
def KD_MANIFEST(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Check that the files are exactly those of the manifest, and rows and tokens add up."""
    return audit.kd_manifest_matches(build.payload, _manifest(build))


@_check("arrays_aligned")
def KD_ALIGNED(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Tokens, loss mask and span have the same documents and keep the format's invariants."""
    return audit.arrays_aligned(build.payload, _manifest(build))


@_check("golden_conversation")
def GOLDEN_CONVERSATION(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Check that the reference conversation renders to its known 132 tokens."""
    return audit.golden_conversation(inputs["o200k_tokenizer"].payload)


def kd_sample(seed: int) -> Check:
    """Return the check that openai-harmony renders a seeded sample to exactly what the shards hold."""

    @_check("sample_renders_alike")
    def sample(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:
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


@_check("split_rule")
def KD_SPLIT(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Check that the hash of every synth_id puts it where it stands."""
    harmony = inputs["synth_harmony"]
    return audit.split_rule_holds(_manifest(build), harmony.payload, harmony.manifest)


@_check("truncation_counts", blocking=False)
def KD_TRUNCATION(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """How many conversations were cut or dropped for their length; a warning above one in two."""
    counts = {name: split["counts"] for name, split in _manifest(build)["splits"].items()}
    rows = sum(split["kept"] for split in counts.values())
    touched = sum(
        value
        for split in counts.values()
        for name, value in split.items()
        if name == "truncated_analysis" or name.startswith("drop_")
    )
    return audit.Outcome(
        touched <= rows / 2, f"{touched} of {rows} conversations were cut or dropped", counts
    )


@_check("documents_aligned")
def HEALING_ALIGNED(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:  # noqa: N802
    """Every document ends with its only EOD, ids lie in the vocabulary, counts are the manifest's."""
    return audit.text_aligned(build.payload, _manifest(build))


def healing_budget(max_tokens: int) -> Check:
    """Return the check that the token budget is kept."""

    @_check("token_budget")
    def budget(build: "Build", inputs: Mapping[str, "Published"]) -> audit.Outcome:
        """Check that the corpus has no more tokens than its budget."""
        tokens = sum(split["tokens"] for split in _manifest(build)["splits"].values())
        return audit.Outcome(
            max_tokens < 0 or tokens <= max_tokens,
            f"{tokens} tokens, budget {'none' if max_tokens < 0 else max_tokens}",
            {"tokens": tokens},
        )

    return budget
