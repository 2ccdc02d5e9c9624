"""A local folder as the source of SYNTH rows: identified by content, the same bytes as the command's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from tests.assets.graphs import Graph, payload_bytes, rows_from
from tests.harmony import inputs
from vpmoe_assets.cli import main

CHAIN = ("o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1")
Local = Callable[..., Graph]


@pytest.fixture
def local(graph) -> Local:
    """Make a graph whose rows come from a folder."""

    def make(folder: Path, changes: dict[str, str] | None = None, **options: str) -> Graph:
        return graph({**rows_from(folder), **(changes or {})}, **options)

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    content = inputs.rows(40)
    content[7]["query"] = None
    made = tmp_path / "rows"
    made.mkdir()
    inputs.write(made / "b.parquet", content[:25])
    inputs.write(made / "c.parquet", content[25:])
    (made / "README.txt").write_text("not a row")
    return made


def built_by_the_command(folder: Path, output: Path, *options: str) -> dict[str, bytes]:
    command = ["data", "build", "--input", str(folder), "--output", str(output)]
    result = CliRunner().invoke(main, [*command, "--seq-len", "1024", "--valid-fraction", "0.1", *options])
    assert result.exit_code == 0, result.output
    return payload_bytes(output, (".bin", ".idx"))


def test_a_folder_becomes_the_shards_that_the_command_builds_from_it(local, folder, tmp_path):
    mine = local(folder)
    run = mine.make(*CHAIN)
    assert run.metadata("synth_harmony")["skipped_rows"] == 1
    assert run.metadata("synth_kd_v1")["dagster/row_count"] <= 39
    synth = mine.latest("synth")
    assert [entry.path for entry in synth.files] == ["b.parquet", "c.parquet"]
    assert synth.details["folder"] == str(folder)
    assert synth.seed is None
    ours = payload_bytes(mine.store.payload(mine.latest("synth_kd_v1")))
    assert ours == built_by_the_command(folder, tmp_path / "kd", "--shards", "2")


def test_a_folder_is_what_is_in_it_wherever_it_lies(local, folder, tmp_path):
    mine = local(folder)
    mine.make("synth")
    first = mine.latest("synth")
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    (moved / "notes.md").write_text("files that are not read do not count")
    assert local(moved).make("synth").reused() == {"synth": True}
    inputs.write(moved / "d.parquet", inputs.rows(3, seed=6))
    run = local(moved).make("synth")
    assert run.reused() == {"synth": False}
    assert (run.metadata("synth")["dagster/row_count"], first.metrics["rows"]) == (43, 40)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_rows_is_refused(local, tmp_path, exists):
    empty = tmp_path / "empty"
    if exists:
        empty.mkdir()
    mine = local(empty)
    run = mine.run("synth")
    found = "has no such file" if exists else "is no directory"
    assert f"sources.synth.path = '{empty}': expected *.parquet, but {empty} {found}" in run.error()
    assert mine.store.assets("tiny") == ["o200k_tokenizer"]


@pytest.mark.shared
def test_real_rows_go_through_the_graph_to_the_bytes_of_the_command(local, shared_dir, tmp_path):
    """250 rows of the published corpus, through every asset of the data path with all its checks."""
    (real,) = shared_dir.glob("synth_rows_*.parquet")
    mine = local(shared_dir, {"num_shards = 4": "num_shards = 4"})
    run = mine.make(*CHAIN)
    assert all(check.passed for asset in CHAIN for check in run.checks(asset).values())
    record = mine.latest("synth_kd_v1")
    total = pq.read_metadata(real).num_rows
    manifest = json.loads((mine.store.directory(record) / "manifest.json").read_bytes())
    counts = [split["counts"] for split in manifest["splits"].values()]
    dropped = sum(value for split in counts for name, value in split.items() if name.startswith("drop_"))
    assert record.metrics["rows"] + dropped + run.metadata("synth_harmony")["skipped_rows"] == total == 250
    ours = payload_bytes(mine.store.payload(record))
    assert ours == built_by_the_command(real, tmp_path / "kd")
    assert "generated" not in run.metadata("synth")["source"]
