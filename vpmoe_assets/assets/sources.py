"""What comes from outside: the tokenizer, the SYNTH rows, the healing corpus."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from trainer.config import Experiment, plain
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.production import Build, Built, Published, produced_asset
from vpmoe_assets.checks import data as checks
from vpmoe_assets.lineage.digest import merkle_root, scan_tree

_HARMONY = "vpmoe_assets/harmony"


def sources_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """Return the ``sources`` group of an experiment."""
    tokenizer, synth_source, corpus_source = (
        experiment.sources.tokenizer,
        experiment.sources.synth,
        experiment.sources.healing_corpus,
    )

    @produced_asset(
        experiment,
        group="sources",
        kinds={"openai", "file"},
        recipe=plain(tokenizer),
        sources=[f"{_HARMONY}/tokenizer.py"],
        checks=[checks.TOKENIZER_AGREES],
    )
    def o200k_tokenizer(build: Build) -> Built:
        """The o200k Harmony vocabulary: the rank file, verified by sha256.

        It lies there under the two names that `openai-harmony` and `tiktoken` look for. Every token id of
        this project is one of its 201,088; nothing is fetched at run time.
        """
        from vpmoe_assets.harmony.tokenizer import write_tokenizer

        digests = write_tokenizer(build.payload)
        return Built(metrics={"vocab_size": tokenizer.vocab_size}, details={"files": digests})

    @produced_asset(
        experiment,
        group="sources",
        kinds={"parquet", "dataset"},
        recipe={**plain(synth_source), "seed": experiment.seed},
        sources=[f"{_HARMONY}/generator.py", f"{_HARMONY}/exercises", f"{_HARMONY}/hub.py"],
        checks=[checks.SOURCE_FILES],
        metadata=_source_metadata,
        external=lambda: _folder_digest(synth_source),
        seed=experiment.seed,
    )
    def synth(build: Build) -> Built:
        """SYNTH rows as parquet: question, reasoning and answer, with their metadata.

        `generated` rows are written by this project from the experiment's seed, and the manifest says so;
        `hub` takes PleIAs/SYNTH at a pinned revision, resumably; `parquet` takes a local folder.
        """
        from vpmoe_assets.harmony.generator import write_synth
        from vpmoe_assets.harmony.hub import fetch_synth

        if synth_source.kind == "generated":
            shutil.rmtree(build.payload)  # of an attempt that was killed: generated rows are cheap
            manifest = write_synth(build.payload, experiment.seed, synth_source.rows)
        elif synth_source.kind == "hub":
            synth_source.require_pins("sources.synth")
            manifest = fetch_synth(synth_source, build.payload)
        else:
            manifest = _copy_parquet(Path(synth_source.path), build.payload)
        return _with_manifest(build, manifest)

    @produced_asset(
        experiment,
        group="sources",
        kinds={"dataset", "json"},
        recipe={**plain(corpus_source), **_python_of(corpus_source)},
        sources=[f"{_HARMONY}/healing.py", f"{_HARMONY}/documents.py", f"{_HARMONY}/hub.py"],
        checks=[checks.SOURCE_FILES],
        metadata=_source_metadata,
        external=lambda: _folder_digest(corpus_source),
    )
    def healing_corpus(build: Build) -> Built:
        """Plain text for the short healing runs after a rung, as JSONL documents.

        In `smoke` it is the prose of `pydoc_data.topics`, the language reference that ships with Python; in
        `full` FineWeb-Edu at a pinned revision, up to a token budget.
        """
        from vpmoe_assets.harmony.healing import build_healing_corpus

        shutil.rmtree(build.payload)
        manifest = build_healing_corpus(
            corpus_source,
            build.payload,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
            cache=build.work.scratch / "downloads",
        )
        return _with_manifest(build, manifest, tokens=manifest["tokens"])

    return [o200k_tokenizer, synth, healing_corpus]


def _with_manifest(build: Build, manifest: dict[str, Any], **metrics: int) -> Built:
    from vpmoe_assets.harmony.completion import write_json

    write_json(build.work.manifest, manifest)
    rows = sum(shard.get("rows", 0) for shard in manifest["storage"]["shards"])
    return Built(metrics={"rows": rows, **metrics} if rows else metrics)


def _source_metadata(item: Published) -> Mapping[str, Any]:
    storage = item.manifest["storage"]
    shown: dict[str, Any] = {"files": table([dict(shard) for shard in storage["shards"][:100]])}
    if "rows" in item.record.metrics:
        shown["dagster/row_count"] = item.record.metrics["rows"]
    if "description" in item.manifest:
        shown["source"] = item.manifest["description"]
    return shown


def _folder_digest(source: Any) -> Mapping[str, str]:
    """A local folder is identified by its content, not by its path."""
    if source.kind not in ("parquet", "folder"):
        return {}
    return {"external:folder": merkle_root(scan_tree(Path(source.path)))}


def _python_of(source: Any) -> dict[str, str]:
    """The prose of pydoc changes with Python's patch releases."""
    import platform

    return {"python": platform.python_version()} if source.kind == "pydoc_topics" else {}


def _copy_parquet(folder: Path, payload: Path) -> dict[str, Any]:
    from vpmoe_assets.harmony.errors import DataError
    from vpmoe_assets.harmony.rows import inspect_inputs

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"sources.synth.path = {str(folder)!r}: no *.parquet file in it")
    for file in files:
        shutil.copyfile(file, payload / file.name)
    copies = inspect_inputs([payload / file.name for file in files])
    shards = [
        {"path": copy.name, "rows": copy.rows, "bytes": Path(copy.path).stat().st_size, "sha256": copy.sha256}
        for copy in copies
    ]
    return {
        "schema_version": "synth_source_v1",
        "kind": "parquet",
        "description": "A local folder of SYNTH-shaped parquet files.",
        "storage": {
            "format": "parquet",
            "glob": "*.parquet",
            "total_rows": sum(copy.rows for copy in copies),
            "shards": shards,
        },
    }
