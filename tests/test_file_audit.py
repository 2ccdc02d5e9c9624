"""Files against a manifest: each kind of difference is named, and only the first in full."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpmoe_assets.file_audit import source_files_match

CONTENT = {"a.bin": b"aaaa", "deep/b.bin": b"bb"}


@pytest.fixture
def payload(tmp_path):
    for name, content in CONTENT.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def manifest(**table):
    shards = [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENT.items()
    ]
    return {"storage": {"shards": shards, **table}}


def test_equal_files_pass(payload):
    assert source_files_match(payload, manifest()) == (True, "2 files as the manifest says", {"files": 2})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "a.bin").unlink(), "a.bin is missing"),
        (lambda root: (root / "c.bin").touch(), "c.bin is not in the manifest"),
        (lambda root: (root / "a.bin").write_bytes(b"a"), "a.bin has 1 bytes, the manifest says 4"),
        (lambda root: (root / "deep" / "b.bin").write_bytes(b"bc"), "deep/b.bin has sha256 "),
    ],
)
def test_every_kind_of_difference_is_named(payload, change, said):
    change(payload)
    verdict = source_files_match(payload, manifest())
    assert not verdict.passed
    assert verdict.description.startswith(said)
    assert verdict.metadata["faults"] == [verdict.description]


def test_the_table_of_a_bundle_counts_and_further_faults_are_counted(payload):
    table = {"path": "tasks.json", "bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()}
    (payload / "a.bin").unlink()
    verdict = source_files_match(payload, manifest(table=table))
    assert verdict.description == "a.bin is missing (and 1 more)"
    assert verdict.metadata == {"files": 3, "faults": ["a.bin is missing", "tasks.json is missing"]}


def test_rows_are_counted_in_the_files(tmp_path):
    table = pa.table({"a": [1, 2, 3]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "y.jsonl").write_bytes(b'{"a": 1}\n\n{"a": 2}\n')
    for name, kind, rows in (("x.parquet", "parquet", 3), ("y.jsonl", "jsonl", 2)):
        other = tmp_path / kind
        other.mkdir()
        (tmp_path / name).rename(other / name)
        content = (other / name).read_bytes()
        shard = {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        def judged(total, directory=other, kind=kind, **stated):
            storage = {"format": kind, "shards": [shard | stated], **total}  # noqa: B023
            return source_files_match(directory, {"storage": storage})

        assert judged({}).passed
        assert judged({"total_rows": rows}, rows=rows).passed
        assert judged({}, rows=rows + 1).description == f"{name}: {rows} rows, the manifest says {rows + 1}"
        wrong = judged({"total_rows": 7}, rows=rows)
        assert wrong.description == f"all files: {rows} rows, the manifest says 7"
