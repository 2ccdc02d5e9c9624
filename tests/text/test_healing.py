"""The healing corpus and its tokens: golden split, cleaned text, verified shards, stable bytes."""

import copy
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.schema.sources import HubText, PydocTopics, TextFolder
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.indexed import IndexedWriter
from vpmoe_assets.harmony.tokenizer import EOD, VOCAB_SIZE, load_tiktoken, write_tokenizer
from vpmoe_assets.hub import HubError, HubFile
from vpmoe_assets.lineage.volatile import without_volatile
from vpmoe_assets.text.audit import text_aligned, tokens_within_budget
from vpmoe_assets.text.documents import folder, split_paragraphs
from vpmoe_assets.text.healing import (
    build_healing_corpus,
    build_healing_text,
    read_corpus,
    split_hash,
    split_of,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHEN = {"git_sha": "f" * 40, "created_unix_s": 1}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


def corpus_of(tmp_path, rows, **options):
    """A corpus built from JSONL rows."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings_ = TextFolder(kind="folder", path=str(source), **options)
    manifest = build_healing_corpus(settings_, tmp_path / "corpus", **WHEN)
    return tmp_path / "corpus", manifest


def documents(count, text="Some words about number {}."):
    return [{"doc_id": f"doc-{n}", "text": text.format(n)} for n in range(count)]


def read_tokens(payload, split):
    """The documents of a split, read by Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(payload / split / "healing_text_v1_tokens"))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [np.array(dataset[position]) for position in range(len(dataset))]


def tree(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_split_hash_and_membership_are_the_published_ones():
    assert split_hash("doc-0") == 13638422549804477074
    valid = [n for n in range(60) if split_of(f"doc-{n}", 0.10) == "valid"]
    assert valid == [7, 19, 20, 21, 49, 50, 52, 59]


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "train"), (1.0, "valid")])
def test_the_ends_of_the_fraction_take_everything(fraction, split):
    assert {split_of(f"doc-{n}", fraction) for n in range(200)} == {split}


def test_megatron_reads_back_every_document_with_one_final_eod(tmp_path, tokenizer_dir):
    corpus, manifest = corpus_of(tmp_path, documents(60))
    text = build_healing_text(corpus, manifest, tmp_path / "text", tokenizer_dir=tokenizer_dir, **WHEN)
    encoding = load_tiktoken(tokenizer_dir)
    for split in ("train", "valid"):
        expected = [n for n in range(60) if split_of(f"doc-{n}", 0.10) == split]
        found = read_tokens(tmp_path / "text", split)
        assert [encoding.decode(tokens[:-1]) for tokens in found] == [
            f"Some words about number {n}." for n in expected
        ]
        assert all(tokens.dtype == np.int32 and tokens[-1] == EOD for tokens in found)
        assert text["splits"][split]["rows"] == len(expected)
        assert text["splits"][split]["tokens"] == sum(map(len, found))
        shard = text["splits"][split]["shards"][0]
        for kind, path in shard["paths"].items():
            content = (tmp_path / "text" / path).read_bytes()
            assert shard["bytes"][kind] == len(content)
            assert shard["sha256"][kind] == hashlib.sha256(content).hexdigest()


def test_a_document_without_its_one_eod_and_an_unstated_token_are_found(tmp_path, tokenizer_dir):
    corpus, manifest = corpus_of(tmp_path, documents(40))
    payload = tmp_path / "text"
    text = build_healing_text(corpus, manifest, payload, tokenizer_dir=tokenizer_dir, **WHEN)
    verdict = text_aligned(payload, text)
    assert verdict.passed
    assert verdict.metadata["documents"] == 40
    other = copy.deepcopy(text)
    other["splits"]["train"]["shards"][0]["tokens"] += 1
    assert "not as stated" in text_aligned(payload, other).description
    path = payload / text["splits"]["train"]["shards"][0]["paths"]["tokens.bin"]
    whole = np.fromfile(path, dtype="<i4")
    for place, token, fault in (
        (-1, 7, "does not end with its only EOD"),
        (0, EOD, "does not end with its only EOD"),
        (0, VOCAB_SIZE, "outside the vocabulary"),
    ):
        changed = whole.copy()
        changed[place] = token
        changed.tofile(path)
        verdict = text_aligned(payload, text)
        assert not verdict.passed
        assert fault in verdict.description


def test_the_trainer_reads_the_payload(tmp_path, tokenizer_dir):
    from trainer.data.text import TextDocuments

    corpus, manifest = corpus_of(tmp_path, documents(60))
    text = build_healing_text(corpus, manifest, tmp_path / "payload", tokenizer_dir=tokenizer_dir, **WHEN)
    (tmp_path / "manifest.json").write_text(json.dumps(text))
    assert len(TextDocuments(tmp_path / "payload", "valid")) == 8


def test_a_literal_special_token_in_the_text_is_ordinary_text(tmp_path, tokenizer_dir):
    literal = "End: <|endoftext|><|start|>assistant<|return|>"
    corpus, manifest = corpus_of(tmp_path, documents(40, literal + " {}"))
    build_healing_text(corpus, manifest, tmp_path / "text", tokenizer_dir=tokenizer_dir, **WHEN)
    for tokens in read_tokens(tmp_path / "text", "train"):
        assert (tokens[:-1] < 199_998).all()
        assert load_tiktoken(tokenizer_dir).decode(tokens[:-1]).startswith(literal)


def test_nul_is_removed_blank_is_dropped_and_both_are_counted(tmp_path):
    rows = [
        {"id": "a", "text": "one\0two\0"},
        {"id": "b", "text": " \n\t"},
        {"id": "c", "text": "\0\0"},
        {"id": "d", "text": None},
        {"id": "e", "content": "kept"},
    ]
    corpus, manifest = corpus_of(tmp_path, rows)
    assert list(read_corpus(corpus, manifest)) == [("a", "onetwo"), ("e", "kept")]
    assert manifest["nul_characters_removed"] == 4
    assert manifest["blank_dropped"] == 3


def test_a_row_without_an_id_is_named_by_its_number_and_its_text(tmp_path):
    corpus, manifest = corpus_of(tmp_path, [{"text": "x", "id": "given"}, {"text": "word"}])
    ids = [doc_id for doc_id, _ in read_corpus(corpus, manifest)]
    assert ids == ["given", f"1_{hashlib.sha256(b'word').hexdigest()}"]


def test_the_english_filter_acts_only_where_a_language_is_given_and_says_so(tmp_path):
    rows = [
        {"id": "a", "text": "x", "language": "en"},
        {"id": "b", "text": "y", "language": "fr"},
        {"id": "c", "text": "z", "lang": "English"},
    ]
    (tmp_path / "with").mkdir()
    corpus, manifest = corpus_of(tmp_path / "with", rows, english_only=True)
    assert [doc_id for doc_id, _ in read_corpus(corpus, manifest)] == ["a", "c"]
    assert manifest["english_filter_applied"] is True
    assert manifest["other_language_dropped"] == 1
    (tmp_path / "without").mkdir()
    _, manifest = corpus_of(tmp_path / "without", [{"id": "a", "text": "x"}], english_only=True)
    assert manifest["english_filter_applied"] is False


def test_the_token_budget_is_never_exceeded(tmp_path, tokenizer_dir):
    rows = documents(60)
    encoding = load_tiktoken(tokenizer_dir)
    lengths = np.cumsum([len(encoding.encode_ordinary(row["text"])) + 1 for row in rows])
    budget = int(lengths[9])
    corpus, manifest = corpus_of(tmp_path, rows, max_tokens=budget + 1)
    assert manifest["tokens"] == budget
    assert manifest["stopped_at_budget"] is True
    assert len(list(read_corpus(corpus, manifest))) == 10
    text = build_healing_text(
        corpus, manifest, tmp_path / "text", tokenizer_dir=tokenizer_dir, max_tokens=budget - 1, **WHEN
    )
    assert sum(split["tokens"] for split in text["splits"].values()) == lengths[8]


def test_the_budget_is_held_against_the_tokens_in_the_files(tmp_path, tokenizer_dir):
    corpus, manifest = corpus_of(tmp_path, documents(40))
    payload = tmp_path / "text"
    text = build_healing_text(corpus, manifest, payload, tokenizer_dir=tokenizer_dir, **WHEN)
    tokens = sum(split["tokens"] for split in text["splits"].values())
    for most, passed in ((-1, True), (tokens, True), (tokens - 1, False)):
        verdict = tokens_within_budget(payload, most)
        assert (verdict.passed, verdict.metadata) == (passed, {"tokens": tokens})
    prefix = payload / "train" / "healing_text_v1_tokens"
    with IndexedWriter(payload / "train" / "unstated", np.int32) as writer:
        writer.append(np.arange(9, dtype=np.int32), [9])
        writer.finish()
    assert tokens_within_budget(payload, tokens).description == f"{tokens + 9} tokens, budget {tokens}"
    with prefix.with_suffix(".bin").open("ab") as file:
        file.write(b"more")
    assert "its index says" in tokens_within_budget(payload, -1).description
    assert not tokens_within_budget(tmp_path / "nothing", -1).passed


def test_shards_hold_the_given_number_of_rows(tmp_path):
    corpus, manifest = corpus_of(tmp_path, documents(25), shard_rows=10)
    shards = manifest["storage"]["shards"]
    assert [(shard["path"], shard["rows"]) for shard in shards] == [
        ("shard_00000.jsonl", 10),
        ("shard_00001.jsonl", 10),
        ("shard_00002.jsonl", 5),
    ]
    assert sum(shard["tokens"] for shard in shards) == manifest["tokens"]
    assert [doc_id for doc_id, _ in read_corpus(corpus, manifest)] == [f"doc-{n}" for n in range(25)]


def test_a_changed_shard_is_refused_before_any_of_it_is_used(tmp_path, tokenizer_dir):
    corpus, manifest = corpus_of(tmp_path, documents(30))
    shard = corpus / "shard_00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"words", b"wards", 1))
    with pytest.raises(DataError, match=r"shard_00000\.jsonl: sha256 is .* its manifest says"):
        build_healing_text(corpus, manifest, tmp_path / "text", tokenizer_dir=tokenizer_dir, **WHEN)
    assert tree(tmp_path / "text") == {}
    shard.unlink()
    with pytest.raises(DataError, match="no such shard"):
        build_healing_text(corpus, manifest, tmp_path / "other", tokenizer_dir=tokenizer_dir, **WHEN)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', "'a' occurs twice"),
        ('{"id": "a", "text": "x"}\n{"id": \n', "line 2: not valid JSON"),
        ('{"id": "a", "title": "x"}\n', "line 1: has id, title; expected one of text, content"),
        ('{"id": "a", "text": 5}\n', "line 1: field 'text' is int"),
        ("[1]\n", "line 1: a JSON list"),
        ('{"id": "a", "text": " "}\n', "corpus is empty"),
        ('{"id": "a", "text": "\\ud800"}\n', "not valid Unicode"),
    ],
)
def test_malformed_sources_are_refused_by_name(tmp_path, lines, message):
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        build_healing_corpus(TextFolder(kind="folder", path=str(tmp_path)), tmp_path / "out", **WHEN)


def test_an_empty_split_is_refused(tmp_path, tokenizer_dir):
    corpus, manifest = corpus_of(tmp_path, documents(3))
    with pytest.raises(DataError, match="the valid split is empty: 3 documents"):
        build_healing_text(corpus, manifest, tmp_path / "text", tokenizer_dir=tokenizer_dir, **WHEN)
    assert tree(tmp_path / "text") == {}
    only = build_healing_text(
        corpus, manifest, tmp_path / "all", tokenizer_dir=tokenizer_dir, valid_fraction=0.0, **WHEN
    )
    assert only["splits"]["valid"] == {"rows": 0, "tokens": 0, "shards": []}
    assert not (tmp_path / "all" / "valid").exists()


def test_a_used_output_directory_and_an_impossible_fraction_are_refused(tmp_path, tokenizer_dir):
    corpus, manifest = corpus_of(tmp_path, documents(30))
    with pytest.raises(DataError, match="not empty"):
        build_healing_text(corpus, manifest, corpus, tokenizer_dir=tokenizer_dir, **WHEN)
    with pytest.raises(ValueError, match=r"valid_fraction must lie in \[0, 1\]"):
        build_healing_text(
            corpus, manifest, tmp_path / "t", tokenizer_dir=tokenizer_dir, valid_fraction=1.5, **WHEN
        )


def test_two_builds_give_the_same_bytes_and_hashes_whatever_the_time_and_place(tmp_path, tokenizer_dir):
    results = []
    for number, name in enumerate(("here", "elsewhere")):
        (tmp_path / name).mkdir()
        corpus, manifest = corpus_of(tmp_path / name, documents(60))
        when = {"git_sha": str(number) * 40, "created_unix_s": number}
        manifest = {**manifest, **when}
        text = build_healing_text(
            corpus, manifest, tmp_path / name / "text", tokenizer_dir=tokenizer_dir, **when
        )
        results.append((tree(corpus), tree(tmp_path / name / "text"), text))
    (first, second) = results
    assert first[:2] == second[:2]
    assert first[2]["config_hash"] == second[2]["config_hash"]
    assert without_volatile(first[2]) == without_volatile(second[2])
    assert first[2] != second[2]


@pytest.mark.parametrize("change", [{"valid_fraction": 0.2}, {"max_tokens": 400}])
def test_the_config_hash_changes_with_what_changes_bytes(tmp_path, tokenizer_dir, change):
    corpus, manifest = corpus_of(tmp_path, documents(60))
    hashes = {
        build_healing_text(corpus, manifest, tmp_path / name, tokenizer_dir=tokenizer_dir, **options, **WHEN)[
            "config_hash"
        ]
        for name, options in (("a", {}), ("b", change))
    }
    assert len(hashes) == 2


def test_pydoc_topics_are_named_with_the_python_they_come_from(tmp_path):
    from pydoc_data.topics import topics

    source = PydocTopics(kind="pydoc_topics")
    manifest = build_healing_corpus(source, tmp_path / "corpus", **WHEN)
    assert manifest["source"]["kind"] == "pydoc_topics"
    assert manifest["source"]["python_version"] == platform.python_version()
    assert "not FineWeb-Edu" in manifest["source"]["description"]
    pieces = {}
    for doc_id, text in read_corpus(tmp_path / "corpus", manifest):
        pieces.setdefault(doc_id.split("/")[1], []).append(text)
    assert {topic: "\n\n".join(parts) for topic, parts in pieces.items()} == {
        topic: text for topic, text in topics.items() if text.strip()
    }
    splits = [split_of(doc_id, 0.1) for doc_id, _ in read_corpus(tmp_path / "corpus", manifest)]
    assert splits.count("valid") >= 5
    assert manifest["tokens"] > 80_000


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab \n", max_size=200), most=st.integers(1, 60))
def test_splitting_at_paragraphs_loses_nothing_and_keeps_paragraphs_whole(text, most):
    pieces = split_paragraphs(text, most)
    assert "\n\n".join(pieces) == text
    assert all(len(piece) <= most or "\n\n" not in piece for piece in pieces)


def folder_of(tmp_path, **files):
    """Build a corpus from files given by name and bytes."""
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name.replace("__", ".")).write_bytes(content)
    source = TextFolder(kind="folder", path=str(tmp_path / "in"))
    return build_healing_corpus(source, tmp_path / "corpus", **WHEN)


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    manifest = folder_of(
        tmp_path,
        a__txt=mark + b"one\r\ntwo\rthree",
        b__jsonl=mark + b'{"id": "b", "text": "four"}\r\n',
        c__txt=b"",
    )
    found = dict(read_corpus(tmp_path / "corpus", manifest))
    assert found == {"a.txt": "one\ntwo\nthree", "b": "four"}
    assert manifest["blank_dropped"] == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfeo\0", r"a\.txt is UTF-16, by its first bytes; save it as UTF-8"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: the text is not valid Unicode"),
        ("a.jsonl", b'{"id": "x", "text": "\\ud800"}', "document 'x': a text is not valid Unicode"),
        ("a.jsonl", b'{"text": {"a": 1}}', r"a\.jsonl, line 1: field 'text' is dict, expected text"),
        ("a.txt", b"", "the healing corpus is empty"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said):
        folder_of(tmp_path, **{name.replace(".", "__"): content})


def test_a_text_that_the_pattern_cannot_cross_is_encoded_in_corpus_and_shards(tmp_path, tokenizer_dir):
    text = "x" + " " * 1_000_100 + "y"
    corpus, manifest = corpus_of(tmp_path, [{"doc_id": "wide", "text": text}])
    made = build_healing_text(
        corpus, manifest, tmp_path / "text", tokenizer_dir=tokenizer_dir, valid_fraction=0, **WHEN
    )
    ids = np.fromfile(tmp_path / "text" / made["splits"]["train"]["shards"][0]["paths"]["tokens.bin"], "<i4")
    assert ids.size == manifest["tokens"] == made["splits"]["train"]["tokens"]
    assert load_tiktoken(tokenizer_dir).decode(ids[:-1].tolist()) == text


def test_a_text_file_that_changes_while_it_is_read_is_refused(tmp_path):
    for name, content in (("a.txt", "one"), ("b.jsonl", '{"text": "two"}\n')):
        (tmp_path / name).write_text(content)
        source = folder(TextFolder(kind="folder", path=str(tmp_path)))
        (tmp_path / name).write_text(content.replace("o", "0"))
        with pytest.raises(DataError, match=f"{name} has changed while it was read"):
            list(source.documents())
        (tmp_path / name).write_text(content)


class FakeHub:
    def __init__(self, files):
        self.files = files
        self.read_paths = []

    def list_files(self, repo, repo_type, revision):
        return [
            HubFile(path, len(content), hashlib.sha256(content).hexdigest())
            for path, content in self.files.items()
        ]

    def read(self, repo, repo_type, revision, file, offset):
        self.read_paths.append(file.path)
        yield self.files[file.path][offset:]


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def hub_source(**more):
    return HubText(
        **{"kind": "hub", "repo": "HuggingFaceFW/fineweb-edu", "revision": COMMIT, "max_tokens": 100, **more}
    )


def test_a_hub_corpus_is_read_file_by_file_until_the_budget_is_reached(tmp_path):
    rows = [
        {"id": f"<urn:{n}>", "text": f"Lesson {n} about water.", "language": "en", "score": 3.5}
        for n in range(40)
    ]
    hub = FakeHub(
        {
            "data/CC-1/train-00000.parquet": parquet(rows[:20]),
            "data/CC-1/train-00001.parquet": parquet(rows[20:]),
            "data/CC-1/test-00000.parquet": parquet(rows[:1]),
            "README.md": b"",
        }
    )
    manifest = build_healing_corpus(hub_source(), tmp_path / "out", cache=tmp_path / "cache", hub=hub, **WHEN)
    assert hub.read_paths == ["data/CC-1/train-00000.parquet"]
    assert manifest["source"]["revision"] == COMMIT
    assert [file["name"] for file in manifest["source"]["files"]] == [
        "data/CC-1/train-00000.parquet",
        "data/CC-1/train-00001.parquet",
    ]
    assert 80 < manifest["tokens"] <= 100
    ids = [doc_id for doc_id, _ in read_corpus(tmp_path / "out", manifest)]
    assert ids == [f"<urn:{n}>" for n in range(len(ids))]


def test_an_unpinned_hub_corpus_is_refused_naming_the_key(tmp_path):
    with pytest.raises(HubError, match=r"sources\.healing_corpus\.revision"):
        build_healing_corpus(
            hub_source(revision=""), tmp_path / "out", cache=tmp_path / "c", hub=FakeHub({}), **WHEN
        )
    assert not Path(tmp_path / "out").exists()


def test_a_damaged_or_doubled_table_of_the_hub_is_refused_by_name(tmp_path):
    whole = parquet([{"id": "a", "text": "Lesson one."}])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), sink)
    for content, said in (
        (whole[:-9], "is not a whole parquet file"),
        (sink.getvalue().to_pybytes(), "has the column text 2 times"),
    ):
        hub = FakeHub({"data/CC-1/train-0.parquet": content})
        with pytest.raises(DataError, match=rf"train-0\.parquet {said}"):
            build_healing_corpus(
                hub_source(), tmp_path / said[:3], cache=tmp_path / f"cache{said[:3]}", hub=hub, **WHEN
            )
