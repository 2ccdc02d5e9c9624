"""`vpmoe data`: datasets without Dagster."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import F, json_option, print_json, refuse_store, user_errors
from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from trainer.contract.scaffold import Scaffold
    from vpmoe_assets.harmony.build import KdBuild
    from vpmoe_assets.harmony.kd_config import KdConfig


def scaffold_options(function: F) -> F:
    """Add the texts that surround every conversation; what is not given is as in the experiments."""
    for flag, text in (
        ("--instructions", "Developer message."),
        ("--knowledge-cutoff", "Of the system message."),
        ("--conversation-start-date", "Of the system message."),
        ("--reasoning-effort", "Of the system message: low, medium or high."),
        ("--model-identity", "First line of the system message."),
    ):
        function = click.option(flag, metavar="TEXT", help=text)(function)
    return click.option("--omit-developer", is_flag=True, help="No developer message.")(function)


@click.group()
def data() -> None:
    """Build datasets straight from files."""


@data.command()
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="FILES",
    help="SYNTH-shaped parquet: files, directories or globs; may be given several times.",
)
@click.argument("more", nargs=-1, metavar="[FILES]...")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--seq-len", default=2048, show_default=True, help="Longest conversation, in tokens.")
@click.option(
    "--valid-fraction", default=0.001, show_default=True, help="Share of conversations held out, in [0, 1]."
)
@click.option("--workers", default=1, show_default=True, help="Processes; the bytes do not depend on it.")
@click.option(
    "--shards", type=int, help="Shards to cut the rows into; by default as many as the experiments."
)
@click.option("--max-rows", default=-1, show_default=True, help="Take only that many rows; -1 takes all.")
@click.option("--pack-block", default=1024, show_default=True, help="Documents a packing block, recorded.")
@scaffold_options
@click.option("--overwrite", is_flag=True, help="Replace an earlier build in OUTPUT.")
@click.option("--shard", type=int, help="Build only this shard, from 0; a last call without it finishes.")
@click.option("--of", "of_shards", type=int, help="Number of shards, with --shard.")
@json_option
def build(
    inputs: tuple[str, ...],
    more: tuple[str, ...],
    output: Path,
    seq_len: int,
    valid_fraction: float,
    workers: int,
    shards: int | None,
    max_rows: int,
    pack_block: int,
    overwrite: bool,
    shard: int | None,
    of_shards: int | None,
    as_json: bool,
    **texts: Any,
) -> None:
    """Build synth_kd_v1 shards with their manifest: same bytes as the asset's.

    Extra columns are ignored, absent metadata columns become null. OUTPUT appears whole or not at all; a
    build that was interrupted goes on from its finished shards. Several machines on one file system can each
    build some shards with --shard I --of N; a last call with --shards N finds them and writes the manifest.

    \b
    Examples:
      vpmoe data build --input rows.parquet --output kd
      vpmoe data build --input synth/*.parquet --output kd --seq-len 1024 --valid-fraction 0.1 --workers 8
      vpmoe data build --input synth/ --output kd --shard 3 --of 16
    """  # noqa: D301
    from vpmoe_assets.codebase.tree import current
    from vpmoe_assets.errors import WorkerError
    from vpmoe_assets.harmony.build import DEFAULT_SHARDS, build_kd, work_dir_of
    from vpmoe_assets.harmony.kd_config import KdConfig
    from vpmoe_assets.harmony.pool import Progress
    from vpmoe_assets.harmony.tokenizer import write_tokenizer
    from vpmoe_assets.lineage.provenance import code_of

    if (shard is None) != (of_shards is None):
        raise click.UsageError("--shard and --of go together")
    if shard is not None and of_shards is not None and not 0 <= shard < of_shards:
        raise click.UsageError(f"--shard must lie in [0, {of_shards}), got {shard}")
    if workers < 1:
        raise click.UsageError(f"--workers must be at least 1, got {workers}")
    refuse_store(output)
    files = input_files([*inputs, *more])  # a shell expands --input *.parquet to one option and the rest
    with user_errors(ValueError, WorkerError), _leaving_nothing(work_dir_of(output), whole=shard is None):
        scaffold, git_sha = _scaffold(**texts), code_of(current()).state.git_sha
        tokenizer_dir = work_dir_of(output) / "tokenizer"
        write_tokenizer(tokenizer_dir)
        if shard is not None and of_shards is not None:
            config = KdConfig(seq_len, valid_fraction, max_rows, pack_block)
            _build_shard(files, output, tokenizer_dir, config, scaffold, shard, of_shards, as_json=as_json)
            return
        built = build_kd(
            files,
            output,
            tokenizer_dir=tokenizer_dir,
            git_sha=git_sha,
            created_unix_s=int(time.time()),
            seq_len=seq_len,
            valid_fraction=valid_fraction,
            workers=workers,
            num_shards=DEFAULT_SHARDS if shards is None else shards,
            max_rows=max_rows,
            pack_block=pack_block,
            scaffold=scaffold,
            overwrite=overwrite,
            progress=Progress,
        )
    _report(built, output, as_json=as_json)


@contextmanager
def _leaving_nothing(work_dir: Path, *, whole: bool) -> Iterator[None]:
    """Remove what a refused build has made; one that was interrupted leaves its finished shards to the next.

    Args:
        work_dir: Where it works; one that was there before is left as it is.
        whole: Whether the build is one of all shards; of a single one others may be at work beside it.
    """
    if work_dir.exists():
        yield
        return
    made = [work_dir, *(path for path in work_dir.parents if not path.exists())]
    try:
        yield
    except BaseException as error:
        # Of a refused input no shard is of use: corrected, it is another input.
        if isinstance(error, ValueError) or not any(work_dir.glob("state/*.done.json")):
            parts = ("tokenizer", "payload", "state") if whole else ("tokenizer",)
            for part in parts:
                shutil.rmtree(work_dir / part, ignore_errors=True)
            with suppress(OSError):  # not empty, or never made
                for path in made:
                    path.rmdir()
        raise


def _scaffold(omit_developer: bool, **texts: Any) -> "Scaffold":
    """Return the scaffold with the texts that were given."""
    from trainer.contract.scaffold import Scaffold

    given = {name: text for name, text in texts.items() if text is not None}
    if omit_developer:
        if "instructions" in given:
            raise click.UsageError("--instructions and --omit-developer contradict each other")
        given["instructions"] = None
    return Scaffold(**given)


def _build_shard(
    files: Sequence[Path],
    output: Path,
    tokenizer_dir: Path,
    config: "KdConfig",
    scaffold: "Scaffold",
    shard: int,
    of_shards: int,
    *,
    as_json: bool,
) -> None:
    from vpmoe_assets.harmony.build import synth_worker, work_dir_of
    from vpmoe_assets.harmony.pool import Progress

    work_dir = work_dir_of(output)
    worker = synth_worker(files, work_dir, tokenizer_dir, config, scaffold=scaffold, num_shards=of_shards)
    with Progress(f"shard {shard} of {of_shards}", worker.sources[shard].rows) as progress:
        result = worker(shard, progress.advance)
    if as_json:
        print_json({"shard": shard, "of": of_shards, "reused": result["reused"]})
    else:
        click.echo(f"shard {shard} of {of_shards} is finished in {work_dir}")


def _report(built: "KdBuild", output: Path, *, as_json: bool) -> None:
    splits = {
        name: {
            "rows": split["rows"],
            "tokens": split["tokens"],
            "bytes": sum(sum(part["bytes"].values()) for part in split["shards"]),
        }
        for name, split in built.manifest["splits"].items()
    }
    if as_json:
        manifest = str(output / "manifest.json")
        print_json({"manifest": manifest, "splits": splits, "reused_shards": built.reused_shards})
        return
    for name, split in splits.items():
        counts = f"{split['rows']:,} conversations, {split['tokens']:,} tokens"
        click.echo(f"{name}: {counts}, {human_bytes(split['bytes'])}")
    if built.reused_shards:
        click.echo(f"{built.reused_shards} shards were finished by an earlier run")
    click.echo(str(output / "manifest.json"))


def input_files(inputs: Sequence[str]) -> list[Path]:
    """Return the parquet files that `--input` names, in the order given; those of one pattern sorted.

    Raises:
        click.ClickException: A name or pattern matches nothing, or something that cannot be read.
    """
    from vpmoe_assets.errors import DataError
    from vpmoe_assets.input_files import input_files as files_of_folder
    from vpmoe_assets.input_files import matching_files

    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        with user_errors(DataError, OSError):
            if path.is_dir():
                found = files_of_folder(path, (".parquet",), deep=False)
            else:
                found = [path] if path.exists() else matching_files(text)
        if not found:
            what = "no *.parquet in directory" if path.is_dir() else "no file at"
            raise click.ClickException(f"--input: {what} {text}")
        files += found
    return files
