"""Rows added, removed and changed, against plain sets, in each format that a data set has."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.harmony.indexed import IndexedWriter
from vpmoe_assets.lineage.errors import ArtifactDamaged, ComparisonError
from vpmoe_assets.lineage.row_changes import compare_rows

tables = st.dictionaries(st.integers(0, 12), st.sampled_from(["x", "y", "z"]), max_size=10)


def lines(directory, rows, name="a.jsonl"):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@given(tables, tables)
def test_rows_with_a_name_are_those_of_two_dictionaries(tmp_path_factory, old, new):
    root = tmp_path_factory.mktemp("rows")
    sides = [
        lines(root / side, [{"id": f"r{key}", "text": text} for key, text in rows.items()])
        for side, rows in (("a", old), ("b", new))
    ]
    found = compare_rows(*sides)
    both = old.keys() & new.keys()
    assert (found.added, found.removed) == (len(new.keys() - old.keys()), len(old.keys() - new.keys()))
    assert found.changed == sum(old[key] != new[key] for key in both)
    assert {each.row for each in found.examples} == {f"r{key}" for key in both if old[key] != new[key]}
    assert found.columns == ({"text": found.changed} if found.changed else {})
    assert set(found.added_examples) == {f"r{key}" for key in new.keys() - old.keys()}
    assert (found.old_rows, found.new_rows) == (len(old), len(new))
    assert found.reordered == (old == new and list(old) != list(new))


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_rows_without_a_name_are_counted_as_often_as_they_occur(tmp_path_factory, old, new):
    root = tmp_path_factory.mktemp("rows")
    sides = [lines(root / side, [{"text": text} for text in rows]) for side, rows in (("a", old), ("b", new))]
    found = compare_rows(*sides)
    one, other = Counter(old), Counter(new)
    assert (found.added, found.removed, found.changed) == ((other - one).total(), (one - other).total(), 0)


def test_a_row_that_moves_to_another_split_was_removed_and_added(tmp_path):
    row = [{"id": "r", "n": 1}]
    found = compare_rows(
        lines(tmp_path / "a", row, "train/x.jsonl"), lines(tmp_path / "b", row, "valid/x.jsonl")
    )
    assert (found.added_examples, found.removed_examples) == (("valid/r",), ("train/r",))


def test_parquet_rows_whatever_the_files_they_lie_in(tmp_path):
    ids, text = [f"s{n}" for n in range(3000)], ["x"] * 3000
    for side in "ab":
        (tmp_path / side).mkdir()
    pq.write_table(pa.table({"synth_id": ids, "text": text}), tmp_path / "a" / "0.parquet")
    changed = [*text[:-1], "other"]
    for part in range(2):
        rows = slice(part * 1500, part * 1500 + 1500)
        table = pa.table({"synth_id": ids[rows], "text": changed[rows]})
        pq.write_table(table, tmp_path / "b" / f"{part}.parquet")
    found = compare_rows(tmp_path / "a", tmp_path / "b")
    assert (found.added, found.removed, found.changed) == (0, 0, 1)
    assert [(each.row, each.columns) for each in found.examples] == [("s2999", ("text",))]
    (tmp_path / "b" / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactDamaged, match=r"0\.parquet cannot be read"):
        compare_rows(tmp_path / "a", tmp_path / "b")


def shard(directory, sequences, masks):
    directory.mkdir(parents=True)
    for name, rows, dtype in (("tokens", sequences, "int32"), ("lossmask", masks, "uint8")):
        with IndexedWriter(directory / f"shard_00_{name}", dtype) as writer:
            for row in rows:
                writer.append(np.array(row, dtype), [len(row)])
            writer.finish()
    return directory.parent


def test_sequences_are_known_by_their_tokens_and_changed_by_their_masks(tmp_path):
    old = shard(tmp_path / "a" / "train", [[1, 2], [3], [4, 5, 6]], [[0, 1], [1], [1, 1, 1]])
    new = shard(tmp_path / "b" / "train", [[1, 2], [4, 5, 6], [7]], [[0, 0], [1, 1, 1], [1]])
    found = compare_rows(old, new)
    assert (found.added, found.removed, found.changed) == (1, 1, 1)
    assert [each.columns for each in found.examples] == [("lossmask",)]
    (tmp_path / "b" / "train" / "shard_00_tokens.bin").write_bytes(b"")
    with pytest.raises(ArtifactDamaged, match="cut off"):
        compare_rows(old, new)


def test_what_has_no_rows_is_refused(tmp_path):
    with pytest.raises(ComparisonError, match="no rows that are known here"):
        compare_rows(tmp_path, tmp_path)
