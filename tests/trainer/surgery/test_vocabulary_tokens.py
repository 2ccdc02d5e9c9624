"""Which tokens two vocabularies share and what a token's pieces are, against the tokenizers library."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from tests.trainer.surgery.vocabulary_cases import english, train_tokenizer
from trainer.surgery.tensorfile import WeightsError
from trainer.surgery.tokens import Vocabulary, piece_ids, read_vocabulary, shared_rows


def vocabulary(ids: dict[str, int], **roles: str) -> Vocabulary:
    return Vocabulary({}, ids, frozenset(), roles)


def test_equal_bytes_are_shared():
    old = vocabulary({"a": 0, "b": 1, "ab": 2})
    new = vocabulary({"b": 0, "ab": 1, "c": 2})
    assert shared_rows(old, new) == {0: 1, 1: 2}


def test_equal_roles_are_shared_under_any_name():
    old = vocabulary({"a": 0, "<end>": 1}, eos="<end>")
    new = vocabulary({"<return>": 7, "a": 8}, eos="<return>")
    assert shared_rows(old, new) == {7: 1, 8: 0}


def test_a_name_in_another_role_is_not_shared():
    old = vocabulary({"<end>": 1, "<pad>": 2}, eos="<end>", pad="<pad>")
    new = vocabulary({"<end>": 5, "<pad>": 6}, pad="<end>", bos="<pad>")
    assert shared_rows(old, new) == {5: 2}


def test_a_token_of_two_roles_counts_for_the_first():
    old = vocabulary({"<end>": 1, "<start>": 3}, eos="<end>", pad="<end>", bos="<start>")
    new = vocabulary({"<end>": 5, "<pad>": 6}, eos="<end>", pad="<pad>")
    assert shared_rows(old, new) == {5: 1}


def test_pieces_are_those_of_the_library(tmp_path: Path):
    tokenizer = train_tokenizer(english()[:40], [], size=600)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = read_vocabulary(tmp_path, {})
    merges = [tuple(pair) for pair in ours.content["model"]["merges"]]
    bare = Tokenizer(models.BPE(vocab=tokenizer.get_vocab(), merges=merges))  # no pre-tokenizer
    for text in ("Ġstatements", "ĊĊĠĠĠĠreturn", "grÃ¶ÃŁer", "ä½łå¥½", "x" * 40, "Ġ"):
        assert piece_ids(ours, text) == bare.encode(text).ids


def test_an_unknown_byte_is_named():
    with pytest.raises(WeightsError, match="'c' is no token"):
        piece_ids(vocabulary({"a": 0}), "ac")


def test_roles_come_from_the_configuration_where_the_tokenizer_states_none(tmp_path: Path):
    tokenizer = train_tokenizer(english()[:5], ["<|end|>", "<|pad|>"], size=300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = read_vocabulary(tmp_path, {"eos_token_id": [298, 299], "pad_token_id": 299, "bos_token_id": None})
    assert found.roles == {"eos": "<|end|>", "pad": "<|pad|>"}
    assert found.role_id("eos") == 298
    assert found.role_id("bos") is None
    assert found.rows == 300


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(WeightsError, match="model type 'BPE' expected, 'Unigram' found"):
        read_vocabulary(tmp_path, {})
