"""SYNTH-shaped rows and builds for tests."""

import hashlib
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe_assets.generated.generator import generate_row
from vpmoe_assets.harmony.build import KdBuild, build_kd

#: About one row in five is longer.
SEQ_LEN = 1000

#: Texts that break careless tokenizers and careless renderers.
HARD_TEXTS = (
    "a literal <|end|> and <|return|> and <|start|>assistant<|channel|>final<|message|>no",
    "<|endoftext|><|startoftext|><|reserved_200500|><|endofprompt|>",
    " leading space, trailing space ",
    "\n\n\nempty lines\n\n",
    "\t\r\n \x0b\x0c",
    "你好，世界。これは長い文です。안녕하세요" * 5,
    "👩‍👩‍👧‍👦🏳️‍🌈😀" * 8,
    "e\u0301 \u00e9 \ufeff \u200b \u2028 \ue000 \U0010ffff",
    "0123456789" * 20,
    "a" * 300,
    "NUL \x00 inside",
    "x",
)


def rows(count: int, seed: int = 5) -> list[dict]:
    """Generated rows; every seventh has a hard text in one of the three places."""
    made = [dict(_row(seed, index)) for index in range(count)]
    for index, row in enumerate(made):
        if index % 7 == 3:
            field = ("query", "synthetic_reasoning", "synthetic_answer")[index // 7 % 3]
            row[field] = HARD_TEXTS[index // 7 % len(HARD_TEXTS)]
    return made


@lru_cache(maxsize=1000)
def _row(seed: int, index: int) -> dict:
    return generate_row(seed, index)


def write(path: Path, content: list[dict], columns: tuple[str, ...] | None = None, group: int = 40) -> Path:
    """Write rows as parquet, all columns as nullable strings."""
    names = columns or ("synth_id", "language", "query", "synthetic_reasoning", "synthetic_answer", "extra")
    schema = pa.schema([pa.field(name, pa.string()) for name in names])
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in content], schema)
    pq.write_table(table, path, row_group_size=group)
    return path


def build(inputs: list[Path], output: Path, tokenizer_dir: Path, **options) -> KdBuild:
    """``build_kd`` with short sequences and a tenth for validation."""
    defaults = {"seq_len": SEQ_LEN, "valid_fraction": 0.1, "git_sha": "0" * 40, "created_unix_s": 1}
    return build_kd(inputs, output, tokenizer_dir=tokenizer_dir, **{**defaults, **options})


def tree(root: Path) -> dict[str, str]:
    """sha256 of every file but the manifest."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
