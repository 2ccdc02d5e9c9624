import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harmony.inputs import rows, write
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.conversation import METADATA_FIELDS
from vpmoe_assets.harmony.rows import describe_row, inspect_inputs, locate, read_batches, shard_range
from vpmoe_assets.harmony.sources import synth_sources


@given(total=st.integers(0, 10_000), count=st.integers(1, 100))
def test_shards_divide_all_rows_evenly_and_in_order(total, count):
    ranges = [shard_range(total, shard, count) for shard in range(count)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("batch_rows", [1, 7, 1024])
def test_any_range_of_several_files_is_read_in_order(tmp_path, batch_rows):
    content = rows(50)
    files = inspect_inputs(
        [
            write(tmp_path / "a.parquet", content[:23], group=10),
            write(tmp_path / "b.parquet", content[23:], group=9),
        ]
    )
    for start, stop in ((0, 50), (0, 0), (5, 6), (9, 31), (23, 50), (22, 24)):
        batches = list(read_batches(files, ("synth_id", "query"), start, stop, batch_rows))
        assert [text for batch in batches for text in batch.columns["query"]] == [
            row["query"] for row in content[start:stop]
        ]
        numbers = [batch.first_row + offset for batch in batches for offset in range(len(batch))]
        assert numbers == list(range(start, stop))
    assert locate(files, 22)[0].name == "a.parquet"
    assert (locate(files, 23)[0].name, locate(files, 23)[1]) == ("b.parquet", 0)
    assert describe_row(files, 24) == "row 24 (b.parquet, row 1)"


def test_absent_metadata_columns_are_null_and_others_are_ignored(tmp_path):
    content = rows(3)
    path = write(
        tmp_path / "a.parquet",
        content,
        ("synth_id", "query", "synthetic_reasoning", "synthetic_answer", "junk"),
    )
    batch = next(read_batches(inspect_inputs([path]), METADATA_FIELDS, 0, 3))
    assert batch.columns["language"] == [None] * 3
    assert batch.columns["synth_id"] == [row["synth_id"] for row in content]


def test_large_dictionary_and_integer_columns_are_read_as_text(tmp_path):
    table = pa.table(
        {
            "synth_id": pa.array([1, 2, None], pa.int64()),
            "query": pa.array(["a", "b", "a"]).dictionary_encode(),
            "synthetic_reasoning": pa.array(["c", None, "ü"], pa.large_string()),
            "synthetic_answer": pa.nulls(3),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    files = inspect_inputs([tmp_path / "a.parquet"])
    batch = next(read_batches(files, tuple(table.column_names), 0, 3))
    assert batch.columns == {
        "synth_id": ["1", "2", None],
        "query": ["a", "b", "a"],
        "synthetic_reasoning": ["c", None, "ü"],
        "synthetic_answer": [None, None, None],
    }


def test_a_lacking_or_wrong_column_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", rows(2), ("synth_id", "query", "synthetic_answer"))
    with pytest.raises(DataError, match=r"a\.parquet has no column synthetic_reasoning"):
        inspect_inputs([path])
    table = pa.table(
        {"synth_id": ["x"], "query": [[1]], "synthetic_reasoning": ["r"], "synthetic_answer": ["a"]}
    )
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: column query has type list"):
        inspect_inputs([tmp_path / "b.parquet"])


def test_no_file_no_input_and_twice_the_same_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no input files"):
        inspect_inputs([])
    with pytest.raises(DataError, match=r"no input file .*x\.parquet"):
        inspect_inputs([tmp_path / "x.parquet"])
    path = write(tmp_path / "a.parquet", rows(2))
    with pytest.raises(DataError, match="given twice"):
        inspect_inputs([path, tmp_path / "." / "a.parquet"])


def test_a_cut_file_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", rows(20))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file \(truncated or damaged\)"):
        inspect_inputs([path])


def test_a_column_whose_name_is_not_utf8_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", rows(20))
    path.write_bytes(path.read_bytes().replace(b"extra", b"\xd0xtra"))
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file .*can't decode byte 0xd0"):
        inspect_inputs([path])


def test_a_page_damaged_in_the_middle_is_refused_when_read(tmp_path):
    path = write(tmp_path / "a.parquet", rows(60))
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(
            read_batches(inspect_inputs([path]), ("query", "synthetic_reasoning", "synthetic_answer"), 0, 60)
        )


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    binary = pa.array([b"ok", b"\xff\xfe"])
    text = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    table = pa.table(
        {"synth_id": ["1", "2"], "query": text, "synthetic_reasoning": ["a", "b"], "synthetic_answer": text}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column query holds bytes that are not UTF-8"):
        list(read_batches(inspect_inputs([tmp_path / "a.parquet"]), ("query",), 0, 2))


def test_a_cap_takes_the_first_complete_rows(tmp_path):
    content = rows(20)
    for index in (0, 1, 7):
        content[index]["query"] = None
    files = inspect_inputs([write(tmp_path / "a.parquet", content)])
    limits = [source.limit for source in synth_sources(files, 4, Scaffold(), max_rows=9)]
    assert limits == [3, 4, 2, 0]
    assert [source.limit for source in synth_sources(files, 4, Scaffold())] == [-1] * 4


def test_a_flipped_bit_in_a_page_with_a_checksum_is_refused(tmp_path):
    table = pa.Table.from_pylist([{**row, "query": f"the {row['synth_id']} question"} for row in rows(9)])
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    for checksum, refused in ((False, False), (True, True)):
        pq.write_table(table, path, write_page_checksum=checksum, **options)
        content = bytearray(path.read_bytes())
        content[content.find(b"question") + 1] ^= 2
        path.write_bytes(content)
        files = inspect_inputs([path])
        if refused:
            with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file.*CRC"):
                list(read_batches(files, ("query",), 0, 9))
        else:
            assert len(next(read_batches(files, ("query",), 0, 9))) == 9


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    names = ["synth_id", "query", "synthetic_reasoning", "synthetic_answer", "query"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 5, names=names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns query"):
        inspect_inputs([tmp_path / "a.parquet"])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", rows(30))
    files = inspect_inputs([path])
    batches = read_batches(files, ("query",), 0, 30, batch_rows=10)
    next(batches)
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(DataError, match=r"a\.parquet has changed while it was read; build again"):
        list(batches)
    with pytest.raises(DataError, match="has changed"):
        next(read_batches(files, ("query",), 0, 30))
    path.unlink()
    with pytest.raises(DataError, match="has changed"):
        next(read_batches(files, ("query",), 0, 30))
