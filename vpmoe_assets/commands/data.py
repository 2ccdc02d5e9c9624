"""`vpmoe data`: datasets without Dagster."""

import glob
import time
from collections.abc import Sequence
from pathlib import Path

import click

from vpmoe_assets.commands.common import human_bytes, json_option, print_json, user_errors


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
    overwrite: bool,
    shard: int | None,
    of_shards: int | None,
    as_json: bool,
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
    from vpmoe_assets.harmony.build import DEFAULT_SHARDS, build_kd, synth_worker, work_dir_of
    from vpmoe_assets.harmony.conversation import Scaffold
    from vpmoe_assets.harmony.kd_config import KdConfig
    from vpmoe_assets.harmony.pool import Progress, WorkerError
    from vpmoe_assets.harmony.tokenizer import write_tokenizer
    from vpmoe_assets.lineage.provenance import code_state

    if (shard is None) != (of_shards is None):
        raise click.UsageError("--shard and --of go together")
    if shard is not None and of_shards is not None and not 0 <= shard < of_shards:
        raise click.UsageError(f"--shard must lie in [0, {of_shards}), got {shard}")
    if workers < 1:
        raise click.UsageError(f"--workers must be at least 1, got {workers}")
    files = input_files([*inputs, *more])  # a shell expands --input *.parquet to one option and the rest
    with user_errors(ValueError, WorkerError):
        git_sha = code_state()["git_sha"]
        tokenizer_dir = work_dir_of(output) / "tokenizer"
        if shard is not None and of_shards is not None:
            write_tokenizer(tokenizer_dir)
            worker = synth_worker(
                files,
                work_dir_of(output),
                tokenizer_dir,
                KdConfig(seq_len, valid_fraction, max_rows),
                scaffold=Scaffold(),
                num_shards=of_shards,
            )
            with Progress(f"shard {shard} of {of_shards}", worker.sources[shard].rows) as progress:
                result = worker(shard, progress.advance)
            if as_json:
                print_json({"shard": shard, "of": of_shards, "reused": result["reused"]})
            else:
                click.echo(f"shard {shard} of {of_shards} is finished in {work_dir_of(output)}")
            return
        write_tokenizer(tokenizer_dir)
        built = build_kd(
            files,
            output,
            tokenizer_dir=tokenizer_dir,
            git_sha=git_sha,
            created_unix_s=int(time.time()),
            seq_len=seq_len,
            valid_fraction=valid_fraction,
            workers=workers,
            num_shards=shards or DEFAULT_SHARDS,
            max_rows=max_rows,
            overwrite=overwrite,
            progress=Progress,
        )
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
        click.ClickException: A name or pattern matches nothing.
    """
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(path.glob("*.parquet"))
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(text, recursive=True))
        if not found:
            what = "no *.parquet in directory" if path.is_dir() else "no file at"
            raise click.ClickException(f"--input: {what} {text}")
        files += found
    return files
