"""Whole builds of `synth_kd_v1`: straight from SYNTH rows (`vpmoe data build`), or from synth_harmony."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_json, sync
from trainer.contract.json_text import parse_json
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.completion import sweep, sync_tree
from vpmoe_assets.harmony.kd import KdWorker
from vpmoe_assets.harmony.kd_config import KdConfig
from vpmoe_assets.harmony.kd_manifest import (
    build_manifest,
    input_from_harmony,
    input_from_synth,
    payload_files,
)
from vpmoe_assets.harmony.pool import Engine, Progress, run_shards
from vpmoe_assets.harmony.rows import inspect_inputs
from vpmoe_assets.harmony.sources import Source, harmony_sources, synth_sources
from vpmoe_assets.harmony.synth_harmony import scaffold_of
from vpmoe_assets.harmony.tokenizer import load_ranks
from vpmoe_assets.harmony.unique import require_unique_ids

MakeProgress = Callable[[str, int], Progress]

#: As many as the smoke and full experiments have, so that ``data build`` gives the asset's bytes by default.
DEFAULT_SHARDS = 4
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class KdBuild:
    """A finished build: its manifest, and how many shards an interrupted earlier run had left finished."""

    manifest: dict[str, Any]
    reused_shards: int


def build_kd(
    input_files: Sequence[Path],
    output_dir: Path,
    *,
    tokenizer_dir: Path,
    git_sha: str,
    created_unix_s: int,
    seq_len: int = 2048,
    valid_fraction: float = 0.001,
    workers: int = 1,
    num_shards: int = DEFAULT_SHARDS,
    max_rows: int = -1,
    pack_block: int = 1024,
    scaffold: Scaffold | None = None,
    overwrite: bool = False,
    progress: MakeProgress | None = None,
) -> KdBuild:
    """Build `OUTPUT/{train,valid}/shard_NN_{tokens,lossmask,span}.{bin,idx}` and `OUTPUT/manifest.json`.

    Everything is made in `.<name>.building` beside the output and renamed at the end, so the output appears
    whole or not at all. A build that was interrupted goes on from its finished shards when it is run again.

    Args:
        input_files: SYNTH-shaped parquet files; row order, and so the bytes, follow the order given.
        output_dir: Must not exist, or be empty, unless `overwrite`.
        tokenizer_dir: Payload of `o200k_tokenizer`.
        git_sha: Commit of the code, for the manifest.
        created_unix_s: Time of the build, for the manifest.
        seq_len: Longest conversation, in tokens.
        valid_fraction: Share of the valid split.
        workers: Processes; the bytes do not depend on it.
        num_shards: The bytes are those of the asset when it has as many.
        max_rows: Take only that many conversations; -1 takes all.
        pack_block: Recorded for the trainer.
        scaffold: System and developer message; the default one if None.
        overwrite: Replace an existing output once the new one is complete.
        progress: Makes a progress display from a label and the number of rows.

    Raises:
        DataError: The output exists, another build of it is running, or the input is not acceptable.
        ValueError: An argument is out of range.
    """
    output_dir = output_dir.absolute()
    config = KdConfig(seq_len, valid_fraction, max_rows, pack_block)
    scaffold = scaffold or Scaffold()
    _require_free(output_dir, overwrite)
    worker = synth_worker(
        input_files, work_dir_of(output_dir), tokenizer_dir, config, scaffold=scaffold, num_shards=num_shards
    )
    source = input_from_synth(worker.sources[0].files, num_shards)  # type: ignore[attr-defined]
    with _locked(work_dir_of(output_dir)) as work:
        build = _run(worker, scaffold, source, git_sha, created_unix_s, processes=workers, progress=progress)
        _require_free(output_dir, overwrite)
        replace_json(work / "payload" / MANIFEST_NAME, build.manifest)
        _publish(work, output_dir)
    return build


def build_kd_from_harmony(
    manifest_path: Path,
    harmony_dir: Path,
    payload_dir: Path,
    state_dir: Path,
    *,
    config: KdConfig,
    tokenizer_dir: Path,
    git_sha: str,
    created_unix_s: int,
    processes: int = 1,
    engine: Engine | None = None,
    progress: MakeProgress | None = None,
) -> KdBuild:
    """Build the payload of `synth_kd_v1` from synth_harmony shards; the caller writes the manifest.

    Args:
        manifest_path: Manifest of synth_harmony.
        harmony_dir: Its payload.
        payload_dir: Gets `train/` and `valid/`.
        state_dir: Survives a crash; finished shards recorded there are not built again.
        config: Of the build.
        tokenizer_dir: Payload of `o200k_tokenizer`.
        git_sha: Commit of the code, for the manifest.
        created_unix_s: Time of the build, for the manifest.
        processes: Worker processes; the bytes do not depend on it.
        engine: Runs the shards in their place; nor on that.
        progress: Makes a progress display from a label and the number of rows.

    Raises:
        DataError: The input is absent, damaged or not acceptable.
    """
    try:
        manifest = parse_json(manifest_path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the manifest of synth_harmony, {manifest_path}: {error}") from error
    load_ranks(tokenizer_dir)
    scaffold = scaffold_of(manifest)
    source = input_from_harmony(manifest_path, harmony_dir, manifest)
    worker = KdWorker(
        tuple(harmony_sources(harmony_dir, manifest, config.max_rows)),
        config,
        config.hash(scaffold, source["manifest_sha256"]),
        tokenizer_dir,
        payload_dir,
        state_dir,
    )
    return _run(
        worker,
        scaffold,
        source,
        git_sha,
        created_unix_s,
        processes=processes,
        engine=engine,
        progress=progress,
        skipped_before=manifest["conversion"]["skipped_rows"],
    )


def synth_worker(
    input_files: Sequence[Path],
    work_dir: Path,
    tokenizer_dir: Path,
    config: KdConfig,
    *,
    scaffold: Scaffold,
    num_shards: int,
) -> KdWorker:
    """Return the worker of a build from SYNTH rows, in the work directory that `build_kd` goes on from."""
    if not 1 <= num_shards <= 100:
        raise ValueError(f"num_shards must lie in [1, 100] (shard names have two digits), got {num_shards}")
    load_ranks(tokenizer_dir)
    files = inspect_inputs(input_files)
    source = input_from_synth(files, num_shards)
    return KdWorker(
        tuple(synth_sources(files, num_shards, scaffold, config.max_rows)),
        config,
        config.hash(scaffold, source["manifest_sha256"]),
        tokenizer_dir.absolute(),
        work_dir / "payload",
        work_dir / "state",
    )


def work_dir_of(output_dir: Path) -> Path:
    """Where an output is made before it is published."""
    return output_dir.absolute().with_name(f".{output_dir.absolute().name}.building")


def _run(
    worker: KdWorker,
    scaffold: Scaffold,
    source: dict[str, Any],
    git_sha: str,
    created_unix_s: int,
    *,
    processes: int,
    engine: Engine | None = None,
    progress: MakeProgress | None,
    skipped_before: int = 0,
) -> KdBuild:
    if not git_sha:
        raise ValueError("git_sha must name the commit that makes the manifest")
    sources: tuple[Source, ...] = worker.sources
    if progress is not None:
        with progress("synth_kd_v1", sum(part.rows for part in sources)) as display:
            shards = run_shards(worker, len(sources), processes, display, engine)
    else:
        shards = run_shards(worker, len(sources), processes, engine=engine)
    require_unique_ids(sources, worker.state_dir)
    manifest = build_manifest(
        shards,
        worker.config,
        scaffold,
        source,
        tokenizer_dir=worker.tokenizer_dir,
        git_sha=git_sha,
        created_unix_s=created_unix_s,
        skipped_before=skipped_before,
    )
    sweep(worker.payload_dir, payload_files(manifest))
    return KdBuild(manifest, sum(shard["reused"] for shard in shards))


def _require_free(output_dir: Path, overwrite: bool) -> None:
    if overwrite and output_dir.is_dir() and not output_dir.is_symlink():
        if not (output_dir / MANIFEST_NAME).is_file() and any(output_dir.iterdir()):
            raise DataError(
                f"{output_dir} exists and has no {MANIFEST_NAME}, so it is no data set of this command: "
                "it will not be overwritten"
            )
        return
    if output_dir.is_symlink() or (output_dir.exists() and not output_dir.is_dir()):
        raise DataError(f"{output_dir} exists and is not a directory; choose another output")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise DataError(f"{output_dir} exists and is not empty; choose another output, or pass --overwrite")


@contextmanager
def _locked(work_dir: Path) -> Iterator[Path]:
    """Return the work directory, held by this process; the operating system lets go when the process ends."""
    work_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(work_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build works in {work_dir}; wait for it, or end it") from None
        if not work_dir.is_dir() or os.stat(work_dir).st_ino != os.fstat(handle).st_ino:
            raise DataError(f"another build has just finished in {work_dir}; run the command again")
        yield work_dir
    finally:
        os.close(handle)


def _publish(work: Path, output_dir: Path) -> None:
    sync_tree(work / "payload")
    replaced = work / "replaced"
    if output_dir.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(output_dir, replaced)
    os.rename(work / "payload", output_dir)
    sync(output_dir.parent)
    shutil.rmtree(work)
