"""Generated rows read again: whatever is wrong with them is found without asking the manifest."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpmoe_assets.generated.audit import rows_as_generated
from vpmoe_assets.generated.generator import write_synth
from vpmoe_assets.verdict import Verdict

SEED, ROWS = 11, 40


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    write_synth(tmp_path / "payload", SEED, ROWS)
    return tmp_path / "payload"


def judged(payload: Path, *, seed: int = SEED, rows: int = ROWS) -> Verdict:
    return rows_as_generated(payload, seed=seed, rows=rows, sample=rows)


def change(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path)), path, compression="zstd")


def replaced(column: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.schema.field(column), pa.array(values))

    return edit


def test_what_was_generated_passes(payload: Path) -> None:
    assert judged(payload) == (
        True,
        "40 rows in order, 40 generated again alike",
        {"rows": 40, "generated_again": 40},
    )
    assert rows_as_generated(payload, seed=SEED, rows=ROWS, sample=5).metadata["generated_again"] == 5


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (replaced("synthetic_answer", 3, "42"), "row 13 is not what the generator makes: synthetic_answer"),
        (replaced("words", 0, 1), "row 10 is not what the generator makes: words"),
        (replaced("synth_id", 2, "other"), "row 12 is other, expected vpmoe-exercises-1-11-00000012"),
        (lambda table: table.slice(1), "row 10 is vpmoe-exercises-1-11-00000011"),
        (lambda table: table.drop_columns(["words"]), "has other columns than generated rows"),
        (
            lambda table: table.set_column(13, "words", table["words"].cast(pa.int32())),
            "has other columns than generated rows",
        ),
    ],
)
def test_every_fault_in_the_files_is_found(
    edit: Callable[[pa.Table], pa.Table], words: str, payload: Path
) -> None:
    change(payload / "synth_001.parquet", edit)
    verdict = judged(payload)
    assert not verdict.passed
    assert words in verdict.description


def test_a_file_that_is_gone_or_none_and_other_rows_than_asked_for_are_found(payload: Path) -> None:
    assert judged(payload, rows=41).description == "40 rows in the files, the experiment asks for 41"
    assert "row 0 is vpmoe-exercises-1-11-00000000" in judged(payload, seed=12).description
    (payload / "synth_003.parquet").unlink()
    assert judged(payload).description == "30 rows in the files, the experiment asks for 40"
    (payload / "synth_003.parquet").write_bytes(b"PAR1")
    assert judged(payload).description.startswith("synth_003.parquet is no parquet file")
