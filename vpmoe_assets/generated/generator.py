"""SYNTH-shaped rows written for this project: problems with computed, true answers, in the corpus's shape.

Row `i` depends on the seed and on `i` alone. Lengths follow those of the real corpus (rendered: mean
about 856 tokens, median 850, 99th percentile 1500, a few in a thousand above 2048); long rows are longer
problems.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpmoe_assets.generated.exercises.catalogue import EXERCISES
from vpmoe_assets.generated.exercises.draft import LANGUAGES

if TYPE_CHECKING:
    import pyarrow as pa

GENERATOR = "vpmoe-exercises"
GENERATOR_VERSION = 1
ROW_GROUP_ROWS = 1000

_LANGUAGE_WEIGHTS = (78, 5, 4, 4, 4, 3, 2)
_FRAME_TOKENS = 101 + 12
"""Tokens of a rendered row beside its three texts: system and developer message, headers, terminators."""


def generate_row(seed: int, index: int) -> dict[str, Any]:
    """Row `index` of the endless sequence that belongs to `seed`.

    Args:
        seed: The experiment's seed.
        index: Position in the sequence, from 0.

    Returns:
        A row with every public SYNTH column.
    """
    rng = random.Random(f"{GENERATOR}/{GENERATOR_VERSION}/{seed}/{index}")
    budget = _target_tokens(rng) - _FRAME_TOKENS
    language = rng.choices(LANGUAGES, _LANGUAGE_WEIGHTS)[0]
    exercise = rng.choice([kind for kind in EXERCISES if kind.longest >= budget])
    draft = exercise.make(rng, language, budget)
    return {
        "synth_id": f"{GENERATOR}-{GENERATOR_VERSION}-{seed}-{index:08d}",
        "language": language,
        "exercise": exercise.name,
        "model": f"{GENERATOR}-{GENERATOR_VERSION}",
        "query": draft.query,
        "query_seed_url": None,
        "query_seed_text": None,
        "additional_seed_url": None,
        "seed_license": "Apache-2.0",
        "constraints": None,
        "script": None,
        "synthetic_reasoning": draft.reasoning,
        "synthetic_answer": draft.answer,
        "words": len(draft.reasoning.split()) + len(draft.answer.split()),
    }


def generate_rows(seed: int, rows: int) -> Iterator[dict[str, Any]]:
    """Return the first `rows` rows of the sequence that belongs to `seed`."""
    return (generate_row(seed, index) for index in range(rows))


def _target_tokens(rng: random.Random) -> int:
    """Return rendered length to aim at, drawn from a fit to the real corpus's lengths."""
    kind = rng.random()
    if kind < 0.004:
        return int(rng.triangular(2100, 3800, 2300))
    if kind < 0.055:
        return int(max(330.0, rng.gauss(1200, 200)))
    return int(min(1500.0, max(330.0, rng.gauss(820, 175))))


def schema() -> "pa.Schema":
    """Arrow schema of the public SYNTH columns."""
    import pyarrow as pa

    names = (
        "synth_id",
        "language",
        "exercise",
        "model",
        "query",
        "query_seed_url",
        "query_seed_text",
        "additional_seed_url",
        "seed_license",
        "constraints",
        "script",
        "synthetic_reasoning",
        "synthetic_answer",
    )
    return pa.schema([*(pa.field(name, pa.string()) for name in names), pa.field("words", pa.int64())])


def write_synth(directory: Path, seed: int, rows: int, files: int = 4) -> dict[str, Any]:
    """Write generated rows as parquet files; the same arguments give the same bytes.

    Args:
        directory: Empty or absent; gets `synth_000.parquet` and so on.
        seed: The experiment's seed.
        rows: Total number of rows, spread over the files in order.
        files: Number of files.

    Returns:
        The manifest: that and by what the rows were generated, and path, rows, bytes and sha256 of each file.

    Raises:
        FileExistsError: The directory already holds something.
        ValueError: Fewer than one row per file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vpmoe_assets.lineage.digest import file_sha256

    if files < 1 or rows < files:
        raise ValueError(f"cannot spread {rows} rows over {files} files; every file needs at least one row")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(
            f"{directory} is not empty; generated rows are written into a directory of their own"
        )
    directory.mkdir(parents=True, exist_ok=True)
    entries, languages, exercises = [], dict.fromkeys(LANGUAGES, 0), {kind.name: 0 for kind in EXERCISES}
    for part in range(files):
        path = directory / f"synth_{part:03d}.parquet"
        first, end = part * rows // files, (part + 1) * rows // files
        with pq.ParquetWriter(path, schema(), compression="zstd") as writer:
            for start in range(first, end, ROW_GROUP_ROWS):
                batch = [
                    generate_row(seed, index) for index in range(start, min(start + ROW_GROUP_ROWS, end))
                ]
                writer.write_table(pa.Table.from_pylist(batch, schema()))
                for row in batch:
                    languages[row["language"]] += 1
                    exercises[row["exercise"]] += 1
        entries.append({
            "path": path.name, "rows": end - first, "bytes": path.stat().st_size, "sha256": file_sha256(path),
        })  # fmt: skip
    return {
        "schema_version": "synth_source_v1",
        "kind": "generated",
        "description": f"Rows written by {GENERATOR} {GENERATOR_VERSION} of this project; not PleIAs/SYNTH.",
        "generator": {"name": GENERATOR, "version": GENERATOR_VERSION, "seed": seed},
        "languages": languages,
        "exercises": exercises,
        "storage": {
            "format": "parquet",
            "glob": "synth_*.parquet",
            "total_rows": rows,
            "total_bytes": sum(entry["bytes"] for entry in entries),
            "shards": entries,
        },
    }
