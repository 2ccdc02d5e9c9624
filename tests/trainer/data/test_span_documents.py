"""Reading span-labelled shards, and refusing every way in which they can disagree."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest

from trainer.data.indexed import SpanDocuments
from trainer.errors import DataError

EOD = 199_999
LENGTHS = [[12, 30, 7], [8], [20, 9]]


@pytest.fixture
def payload(kd_payload):
    return kd_payload(train=LENGTHS, valid=[[11]])


def shard_file(payload, kind, suffix, shard=1):
    return payload.root / "train" / f"shard_{shard:02d}_{kind}{suffix}"


def test_documents_of_all_shards_in_order(payload):
    documents = SpanDocuments(payload.root, "train")
    expected = [each for shard in payload.documents["train"].values() for each in shard]
    assert documents.lengths.tolist() == [length for shard in LENGTHS for length in shard]
    assert len(documents) == len(expected)
    for number, (tokens, mask, span) in enumerate(expected):
        found = documents[number]
        assert (found.tokens.dtype, found.loss_mask.dtype, found.span.dtype) == (np.int32, np.uint8, np.uint8)
        assert np.array_equal(found.tokens, tokens)
        assert np.array_equal(found.loss_mask, mask)
        assert np.array_equal(found.span, span)
    assert documents.describe(3) == f"document 0 of {shard_file(payload, 'tokens', '.bin')}"


def test_arrays_outlive_the_files(payload):
    found = SpanDocuments(payload.root, "train")[0].tokens
    shutil.rmtree(payload.root)
    assert found[-1] == EOD


def test_manifest_beside_the_payload(payload):
    inside = payload.root / "payload"
    inside.mkdir()
    (payload.root / "train").rename(inside / "train")
    assert len(SpanDocuments(inside, "train")) == 6


def test_reader_can_go_to_another_process(payload):
    documents = pickle.loads(pickle.dumps(SpanDocuments(payload.root, "train")))
    assert documents[0].tokens[-1] == EOD


@pytest.mark.parametrize("document", [-1, 6])
def test_no_such_document(payload, document):
    with pytest.raises(IndexError, match=f"document {document}"):
        SpanDocuments(payload.root, "train")[document]


def test_missing_manifest_is_refused(payload):
    (payload.root / "manifest.json").unlink()
    with pytest.raises(DataError, match=f"no manifest.*{re.escape(str(payload.root))}"):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a data manifest"),
        ("[]", "not a data manifest"),
        ('{"schema_version": "synth_kd_v2"}', "synth_kd_v2"),
        ('{"schema_version": "synth_kd_v1"}', "no config"),
        ('{"schema_version": "synth_kd_v1", "config": {}}', r"no config\.loss_mask_alignment"),
        (
            '{"schema_version": "synth_kd_v1", "config": {"loss_mask_alignment": "tokens"}}',
            "'tokens'",
        ),
    ],
)
def test_manifest_that_does_not_say_what_is_needed_is_refused(payload, text, message):
    (payload.root / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        SpanDocuments(payload.root, "train")


def test_empty_split_is_refused(payload):
    with pytest.raises(DataError, match="'test' split is empty"):
        SpanDocuments(payload.root, "test")


def test_shards_that_the_manifest_does_not_list_are_refused(payload):
    payload.manifest["splits"]["train"]["shards"].pop()
    payload.save()
    with pytest.raises(DataError, match=r"has shards .*'shard_02'\], its manifest lists"):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize("field", ["rows", "tokens"])
def test_counts_that_differ_from_the_manifest_are_refused(payload, field):
    payload.manifest["splits"]["train"]["shards"][2][field] += 1
    payload.save()
    with pytest.raises(DataError, match=r"shard_02.*in the manifest"):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize("kind", ["tokens", "lossmask", "span"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(payload, kind, suffix):
    shard_file(payload, kind, suffix).unlink()
    with pytest.raises(DataError, match=re.escape(f"shard_01_{kind}{suffix} is missing")):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize("kind", ["tokens", "lossmask", "span"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", [0, 10, -1, +1])
def test_file_of_another_size_is_named(payload, kind, suffix, size):
    path = shard_file(payload, kind, suffix, shard=0)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" if size == 1 else data[:size])
    with pytest.raises(DataError, match=re.escape(f"shard_00_{kind}{suffix}")):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"X", "not a Megatron index"),
        (9, b"\x02", "version 2"),
        (17, b"\x01", "element type uint8; expected int32"),
        (17, b"\x63", "element type code 99"),
        (34, b"\xff\xff\xff\xff", "document 0 has length -1"),
        (34, b"\x0d", "byte offsets do not follow"),
        (34 + 12 * 3 + 8, b"\x02", "document indices are not"),
    ],
    ids=["magic", "version", "dtype", "unknown dtype", "negative length", "length", "document indices"],
)
def test_index_that_contradicts_itself_is_refused(payload, at, value, message):
    path = shard_file(payload, "tokens", ".idx", shard=0)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"shard_00_tokens.idx.*{message}"):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize("kind", ["lossmask", "span"])
def test_sidecar_of_another_build_is_refused(payload, kd_payload, kind):
    """Same number of documents and of tokens, other lengths: counts alone would not notice."""
    other = kd_payload(seed=1, train=[[12, 7, 30]])
    for suffix in (".bin", ".idx"):
        shutil.copy(shard_file(other, kind, suffix, 0), shard_file(payload, kind, suffix, 0))
    with pytest.raises(
        DataError, match=rf"shard_00_{kind}.idx: document 1 has length 7.*30 \(2 documents differ\)"
    ):
        SpanDocuments(payload.root, "train")


@pytest.mark.parametrize("kind", ["lossmask", "span"])
def test_sidecar_with_fewer_documents_is_refused(payload, kd_payload, kind):
    other = kd_payload(seed=1, train=[[12, 30]])
    for suffix in (".bin", ".idx"):
        shutil.copy(shard_file(other, kind, suffix, 0), shard_file(payload, kind, suffix, 0))
    with pytest.raises(DataError, match=f"shard_00_{kind}.idx has 2 documents.*3"):
        SpanDocuments(payload.root, "train")


def test_document_that_does_not_end_with_eod_is_refused_on_opening(payload):
    def change(tokens, mask, span):
        tokens[-1] = 5

    payload.rewrite("train", "shard_00", 1, change)
    with pytest.raises(DataError, match=r"shard_00_tokens\.bin: document 1 ends with token 5"):
        SpanDocuments(payload.root, "train")


def second_eod(tokens, mask, span):
    tokens[3] = EOD


def mask_without_span(tokens, mask, span):
    mask[0] = 1


def span_without_mask(tokens, mask, span):
    span[0] = 2


def unknown_span(tokens, mask, span):
    span[10] = 3


def fractional_mask(tokens, mask, span):
    mask[10] = 2


def supervised_after_eod(tokens, mask, span):
    mask[-1] = span[-1] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (second_eod, r"EOD 199999 at positions \[3, 29\]"),
        (mask_without_span, "loss mask 1 with span 0 at position 0"),
        (span_without_mask, "loss mask 0 with span 2 at position 0"),
        (unknown_span, "loss mask 1 with span 3 at position 10"),
        (fractional_mask, "loss mask 2 with span 1 at position 10"),
        (supervised_after_eod, "prediction after EOD is supervised"),
    ],
)
def test_damaged_document_is_refused_when_it_is_read(payload, change, message):
    payload.rewrite("train", "shard_00", 1, change)
    documents = SpanDocuments(payload.root, "train")
    documents[0]
    with pytest.raises(DataError, match=f"document 1 of .*shard_00_tokens.bin: .*{message}"):
        documents[1]


def test_index_of_one_shard_has_the_documented_size(payload):
    assert shard_file(payload, "tokens", ".idx", 0).stat().st_size == 34 + 12 * 3 + 8 * 4
    assert (
        json.loads((payload.root / "manifest.json").read_text())["splits"]["train"]["shards"][0]["rows"] == 3
    )
