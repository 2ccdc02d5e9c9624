"""The tokenizers against tiktoken, the published files' sha256 and known encodings."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vpmoe_assets.donors import tokenizers
from vpmoe_assets.donors.tokenizers import o200k_tokenizer_json, qwen3_ranks, qwen3_tokenizer_json
from vpmoe_assets.errors import DonorError

TEXTS = [
    "Hello, world!",
    " The quick brown fox: 12345678901 items at $3.50 — don't panic!",
    "def f(x):\n\treturn x**2  # naïve\r\n\r\n\n   end",
    "Ünïcödé: 你好,世界。 こんにちは 안녕 Привет مرحبا नमस्ते ψ∑∫ 👩‍👩‍👧 🇩🇪",
    "IT'S WE'LL I'd've\u00a0non-breaking\u2003em",
    "a" * 300,
    "",
]


@pytest.fixture(scope="module")
def qwen_tokenizer(qwen3: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(qwen3)


@pytest.fixture(scope="module")
def o200k(gpt_oss: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gpt_oss)


def test_the_files_are_the_published_ones_byte_for_byte(qwen3: Path, gpt_oss: Path):
    digests = {
        path: hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest() for path in (qwen3, gpt_oss)
    }
    assert digests[qwen3] == "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    assert digests[gpt_oss] == "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [9707, 11, 1879, 0]),
        ("<|im_start|>user\n", [151644, 872, 198]),
        ("<think>\n\n</think>\n\n", [151667, 271, 151668, 271]),
        ("<|endoftext|>", [151643]),
    ],
)
def test_qwen3_gives_its_known_encodings(qwen_tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]):
    assert qwen_tokenizer(text)["input_ids"] == ids


@pytest.mark.parametrize("text", TEXTS)
def test_qwen3_encodes_as_tiktoken_with_the_same_ranks(qwen_tokenizer: PreTrainedTokenizerBase, text: str):
    oracle = tiktoken.Encoding(
        "qwen3", pat_str=tokenizers.QWEN3_PATTERN, mergeable_ranks=_ranks(), special_tokens={}
    )
    ids = qwen_tokenizer(text)["input_ids"]
    assert ids == oracle.encode_ordinary(text)
    assert qwen_tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_o200k_encodes_as_tiktoken(o200k: PreTrainedTokenizerBase, ranks: Mapping[bytes, int], text: str):
    oracle = tiktoken.Encoding(
        "o200k", pat_str=_o200k_pattern(), mergeable_ranks=dict(ranks), special_tokens={}
    )
    ids = o200k(text)["input_ids"]
    assert ids == oracle.encode_ordinary(text)
    assert o200k.decode(ids) == text


def test_special_tokens_have_their_roles_and_ids(
    qwen_tokenizer: PreTrainedTokenizerBase, o200k: PreTrainedTokenizerBase
):
    assert (qwen_tokenizer.eos_token_id, qwen_tokenizer.pad_token_id) == (151645, 151643)
    assert qwen_tokenizer.bos_token is None
    assert (o200k.bos_token_id, o200k.eos_token_id, o200k.pad_token_id) == (199998, 200002, 199999)
    assert o200k("<|start|>assistant<|channel|>final<|message|>")["input_ids"][0::2] == [
        200006,
        200005,
        200008,
    ]
    assert (len(qwen_tokenizer), len(o200k)) == (151669, 200019)


def test_ranks_that_make_another_file_are_refused(ranks: dict[bytes, int]):
    small = {token: rank for token, rank in ranks.items() if rank < 300}
    with pytest.raises(DonorError, match="the ranks are not o200k_base's"):
        o200k_tokenizer_json(small)


def test_a_rank_that_no_merge_makes_is_named():
    with pytest.raises(DonorError, match=r"rank 2 \(b'abc'\) cannot be made"):
        qwen3_tokenizer_json({b"a": 0, b"b": 1, b"abc": 2})


def test_a_carrier_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizers, "QWEN3_CARRIER", ("no-such-package", "x"))
    with pytest.raises(DonorError, match="no-such-package, which is not installed; run `make setup`"):
        qwen3_ranks()


def test_a_carrier_with_other_ranks_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizers, "QWEN3_RANKS_SHA256", "0" * 64)
    with pytest.raises(DonorError, match="expected 0000"):
        qwen3_ranks()


def test_every_byte_has_a_character_of_its_own():
    table = tokenizers.byte_characters()
    assert len(set(table.values())) == 256
    assert (table[ord("A")], table[ord(" ")], table[ord("\n")]) == ("A", "Ġ", "Ċ")
    assert not any(character.isspace() for character in table.values())


def test_the_added_tokens_are_those_of_the_published_file(qwen3: Path):
    added = json.loads((qwen3 / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [token["id"] for token in added] == list(range(151643, 151669))
    assert [token["content"] for token in added if token["id"] in (151645, 151657, 151668)] == [
        "<|im_end|>",
        "<tool_call>",
        "</think>",
    ]


_cache: dict[str, dict[bytes, int]] = {}


def _ranks() -> dict[bytes, int]:
    if "qwen3" not in _cache:
        _cache["qwen3"] = qwen3_ranks()
    return _cache["qwen3"]


def _o200k_pattern() -> str:
    # The alternatives as the encoding's authors publish them.
    letters = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return "|".join(
        [
            f"{letters}{upper}*{lower}+{contraction}",
            f"{letters}{upper}+{lower}*{contraction}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
