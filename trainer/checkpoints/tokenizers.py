"""The tokenizer of a checkpoint, behind one small interface."""

import hashlib
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from trainer.contract.text_runs import LONGEST_RUN, is_panic, segments
from trainer.errors import EvaluationError

RANKS_NAME = "o200k_base.tiktoken"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
RANKS_FINGERPRINT = "c05c175789154cd4457f2a05038a06cfb7887115e6ab254e6b865dc89e2d412b"
"""`Tokenizer.fingerprint` of the same tokenizer in any format."""
_CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"
"""Name under which tiktoken looks for the ranks in its cache: sha1 of the file's public address."""
_STARTOFTEXT, _ENDOFTEXT = 199998, 199999

_PROBES = (
    "The quick brown fox doesn't jump; it'll WALK, won't it?",
    "  two  spaces\n\n\tand a tab \r\n",
    "0 12 345 6789 1234567890 1.2345e-10 1/3 = 0.333...",
    "2025-08-05T12:34:56Z https://example.org/a_b?c=d&e=%20",
    "def f(x):\n    return {'k': [x ** 2, -x]}  # comment",
    "Zażółć gęślą jaźń – naïve café – größer – ¿qué?",
    "Привет мир 你好,世界 こんにちは 안녕하세요 مرحبا שלום",
    "👩‍🚀🇫🇷 e\u0301 \u00a0 \u200b ﬁ Ⅷ ½",
)
"""Texts on which two tokenizers of the same vocabulary still differ when they split or normalise text
differently."""

_environment = threading.Lock()


class Tokenizer(ABC):
    """Text to ids and back, without any template around it.

    Attributes:
        bos: Id that a scored sequence starts with.
        eos: Id that ends a document, or None.
        special: Ids of the named special tokens; ordinary text never encodes to them.
    """

    bos: int
    eos: int | None
    special: Mapping[str, int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens by name; broken UTF-8 becomes the replacement character."""

    @abstractmethod
    def ordinary(self) -> Iterable[tuple[int, bytes]]:
        """Every token that text can encode to: id and bytes."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the ordinary vocabulary and the ids of some hard texts.

        Equal for two files of the same tokenizer in different formats, which their own digests are not:
        perplexities are compared, and token data read, only where it is equal.
        """
        digest = hashlib.sha256()
        for number, token in sorted(self.ordinary()):
            digest.update(f"{number} {token.hex()}\n".encode())
        for ids in self.encode_many(_PROBES):
            digest.update(f"{ids}\n".encode())
        return digest.hexdigest()


class O200kTokenizer(Tokenizer):
    """The o200k Harmony vocabulary from the rank file of the `o200k_tokenizer` artifact.

    Args:
        directory: Holds `o200k_base.tiktoken`.

    Raises:
        EvaluationError: The file is missing or is not the pinned one.
    """

    _fingerprint: ClassVar[str | None] = None

    def __init__(self, directory: Path) -> None:
        path = directory / RANKS_NAME
        try:
            ranks = path.read_bytes()
        except OSError as error:
            raise EvaluationError(
                f"no tokenizer file {path} ({error.strerror}): give the payload of o200k_tokenizer"
            ) from error
        found = hashlib.sha256(ranks).hexdigest()
        if found != RANKS_SHA256:
            raise EvaluationError(
                f"{path}: sha256 is {found}, expected {RANKS_SHA256}; materialise o200k_tokenizer again"
            )
        self._encoding = _tiktoken(ranks)
        self.bos, self.eos = _STARTOFTEXT, _ENDOFTEXT
        self.special = {
            name: self._encoding.encode_single_token(name) for name in self._encoding.special_tokens_set
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the name of a special token in it is ordinary text.

        Raises:
            EvaluationError: It is not valid Unicode, or has no encoding.
        """
        ids: list[int] = []
        with _refused(text):
            for part, one_piece in segments(text):
                encode = self._encoding._encode_single_piece if one_piece else self._encoding.encode_ordinary
                ids += encode(part)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, on all cores.

        Raises:
            EvaluationError: As `encode`.
        """
        if any(len(text) >= LONGEST_RUN for text in texts):
            return [self.encode(text) for text in texts]
        for text in texts:
            with _refused(text):
                pass
        threads = len(os.sched_getaffinity(0))
        ids: list[list[int]] = self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens by name."""
        text: str = self._encoding.decode(list(ids))
        return text

    @property
    def fingerprint(self) -> str:
        """As of every tokenizer; taken once in a process, for all instances have the same verified ranks."""
        known = O200kTokenizer._fingerprint
        if known is None:
            known = O200kTokenizer._fingerprint = super().fingerprint
        return known

    def ordinary(self) -> Iterable[tuple[int, bytes]]:
        """Return the mergeable tokens."""
        return ((number, self._encoding.decode_single_token_bytes(number)) for number in range(_STARTOFTEXT))


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer files of a Hugging Face directory.

    Its BOS is what scored sequences start with; a tokenizer without one uses its EOS, and one without either
    id 0.

    Args:
        directory: Holds `tokenizer.json`.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        if not (directory / "tokenizer.json").is_file():
            raise EvaluationError(f"{directory} holds no tokenizer.json: it is no complete checkpoint")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the library's parser raises bare exceptions
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise EvaluationError(
                f"the tokenizer of {directory} cannot be read ({said}): a file is cut off or damaged; "
                "restore it"
            ) from error
        self.eos = self._tokenizer.eos_token_id
        bos = self._tokenizer.bos_token_id
        self.bos = bos if bos is not None else self.eos if self.eos is not None else 0
        self.special = dict(self._tokenizer.get_added_vocab())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without what the tokenizer would put around it."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, on all cores."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens by name."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def ordinary(self) -> Iterable[tuple[int, bytes]]:
        """Return the vocabulary without added tokens; byte-level symbols as the bytes they stand for."""
        to_byte = {symbol: byte for byte, symbol in byte_symbols().items()}
        for token, number in self._tokenizer.get_vocab().items():
            if token in self.special:
                continue
            if all(symbol in to_byte for symbol in token):
                yield number, bytes(to_byte[symbol] for symbol in token)
            else:
                yield number, token.encode()


def byte_symbols() -> dict[int, str]:
    """Return the printable character that byte-level BPE files write for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    return symbols | {byte: chr(256 + place) for place, byte in enumerate(others)}


@contextmanager
def _refused(text: str) -> Iterator[None]:
    """Refuse a text that has no encoding; for a lone surrogate tiktoken would put another character."""
    try:
        if not text.isascii():
            text.encode("utf-8")
        yield
    except UnicodeEncodeError as error:
        raise EvaluationError(
            f"the text {text[:40]!r} is not valid Unicode ({error.reason} at {error.start}); correct it"
        ) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise EvaluationError(
            f"the text {text[:40]!r} of {len(text)} characters makes tiktoken panic ({error}); shorten it"
        ) from None


def _tiktoken(ranks: bytes) -> Any:
    import tiktoken

    # tiktoken deletes a cached file that it dislikes and then asks the network: it gets a copy of bytes that
    # were just verified, and reads it once per process.
    with _environment, tempfile.TemporaryDirectory(prefix="o200k-") as copy:
        (Path(copy) / _CACHE_NAME).write_bytes(ranks)
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = copy
        try:
            return tiktoken.get_encoding("o200k_harmony")
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before
