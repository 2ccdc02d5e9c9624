"""Plain text for healing runs: a corpus of documents as JSONL, and its tokens in Megatron's format.

The two steps are apart because the corpus is worth keeping: it is what people read when a loss looks odd.
"""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trainer.contract.canonical import sha256_json
from trainer.contract.json_text import parse_json
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.indexed import IndexedWriter
from vpmoe_assets.harmony.split import SPLITS
from vpmoe_assets.harmony.tokenizer import (
    EOD,
    RANKS_NAME,
    RANKS_SHA256,
    VOCAB_SIZE,
    TextError,
    text_encoder,
    write_tokenizer,
)
from vpmoe_assets.hub import HubClient
from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.lineage.volatile import without_volatile
from vpmoe_assets.text.documents import ENGLISH, Document, DocumentSource, folder, hub_text, pydoc_topics

if TYPE_CHECKING:
    from trainer.contract.schema.sources import HubText, PydocTopics, TextFolder

CORPUS_SCHEMA = "healing_corpus_v1"
TEXT_SCHEMA = "healing_text_v1"
DEFAULT_SHARD_ROWS = 50_000


def split_hash(doc_id: str) -> int:
    """First 8 bytes of SHA-256 over the UTF-8 id, as a big-endian integer in [0, 2**64)."""
    return int.from_bytes(hashlib.sha256(doc_id.encode("utf-8")).digest()[:8], "big")


def split_of(doc_id: str, valid_fraction: float) -> str:
    """Return `valid` when the id's hash lies below that fraction of its range, else `train`."""
    return "valid" if split_hash(doc_id) < int(Decimal(str(valid_fraction)) * 2**64) else "train"


def document_source(
    source: "PydocTopics | HubText | TextFolder", *, cache: Path | None = None, hub: HubClient | None = None
) -> DocumentSource:
    """Return the documents of an experiment's `sources.healing_corpus`.

    Args:
        source: The config table.
        cache: Where a hub source keeps its downloads between attempts; needed for that kind.
        hub: Client of the hub; the public one by default.
    """
    if source.kind == "pydoc_topics":
        return pydoc_topics(source)
    if source.kind == "folder":
        return folder(source)
    if cache is None:
        raise ValueError("a hub source needs a directory for its downloads")
    return hub_text(source, cache, hub)


def build_healing_corpus(
    source: "PydocTopics | HubText | TextFolder",
    output: Path,
    *,
    git_sha: str,
    created_unix_s: int,
    cache: Path | None = None,
    hub: HubClient | None = None,
) -> dict[str, Any]:
    """Write a corpus as `shard_00000.jsonl` and so on, one `{"doc_id", "text"}` a line.

    NUL characters are removed, blank documents dropped, documents in another language too where the source
    says the language and English alone was asked for; all are counted. A token budget is never exceeded.

    Args:
        source: The experiment's `sources.healing_corpus`.
        output: The payload directory; empty or absent.
        git_sha: Commit of the code, for the manifest.
        created_unix_s: Time of the build, for the manifest.
        cache: Downloads of a hub source, kept between attempts.
        hub: Client of the hub; the public one by default.

    Returns:
        The manifest.

    Raises:
        DataError: The source is not usable, an id occurs twice, or no document is left.
    """
    documents = document_source(source, cache=cache, hub=hub)
    _require_empty(output)
    most = getattr(source, "max_tokens", -1)
    counts = _CorpusCounts()
    cleaned = _clean(documents.documents(), getattr(source, "english_only", False), counts)
    shards = _write_corpus(cleaned, output, getattr(source, "shard_rows", DEFAULT_SHARD_ROWS), most, counts)
    if not shards:
        raise DataError(f"the healing corpus is empty: {counts}")
    return {
        "schema_version": CORPUS_SCHEMA,
        "created_unix_s": created_unix_s,
        "git_sha": git_sha,
        "source": documents.identity,
        "max_tokens": most,
        "english_filter_applied": counts.english_filter_applied,
        "tokenizer_sha256": RANKS_SHA256,
        "tokens": sum(shard["tokens"] for shard in shards),
        "nul_characters_removed": counts.nul_removed,
        "blank_dropped": counts.blank,
        "other_language_dropped": counts.other_language,
        "stopped_at_budget": counts.stopped_at_budget,
        "storage": {
            "format": "jsonl",
            "glob": "shard_*.jsonl",
            "total_rows": sum(shard["rows"] for shard in shards),
            "total_bytes": sum(shard["bytes"] for shard in shards),
            "shards": shards,
        },
    }


def build_healing_text(
    corpus: Path,
    corpus_manifest: Mapping[str, Any],
    output: Path,
    *,
    tokenizer_dir: Path,
    valid_fraction: float = 0.10,
    max_tokens: int = -1,
    git_sha: str,
    created_unix_s: int,
) -> dict[str, Any]:
    """Tokenise a corpus into `{train,valid}/healing_text_v1_tokens.{bin,idx}`, one document one sequence.

    The text is encoded as text: a literal `<|endoftext|>` in it becomes ordinary tokens. Each document ends
    with one EOD.

    Args:
        corpus: Directory of the JSONL shards.
        corpus_manifest: Its manifest; every shard's sha256 is compared before it is read.
        output: The payload directory; empty or absent.
        tokenizer_dir: Payload of the tokenizer.
        valid_fraction: Share of ids in the valid split, in [0, 1].
        max_tokens: Stop before exceeding this many tokens, EODs included; -1 takes all.
        git_sha: Commit of the code, for the manifest.
        created_unix_s: Time of the build, for the manifest.

    Returns:
        The manifest; its `config_hash` covers all that decides the bytes, and neither time nor place.

    Raises:
        DataError: A shard is absent, damaged or malformed, or a split that should have documents is empty.
    """
    if not 0 <= valid_fraction <= 1:
        raise ValueError(f"valid_fraction must lie in [0, 1], got {valid_fraction}")
    _require_empty(output)
    results = _write_splits(
        read_corpus(corpus, corpus_manifest), output, tokenizer_dir, valid_fraction, max_tokens
    )
    config = {
        "valid_fraction": valid_fraction,
        "hash": "sha256-8",
        "max_tokens": max_tokens,
        "eod_token_id": EOD,
        "special_tokens_in_text": "encoded as ordinary text",
        "tokenizer_sha256": RANKS_SHA256,
        "input_manifest_sha256": sha256_json(without_volatile(dict(corpus_manifest))),
    }
    return {
        "schema_version": TEXT_SCHEMA,
        "created_unix_s": created_unix_s,
        "git_sha": git_sha,
        "config_hash": sha256_json(config),
        "input": {"source": corpus_manifest["source"], "manifest_sha256": config["input_manifest_sha256"]},
        "tokenizer": {
            "type": "o200k_harmony",
            "model_path": str(tokenizer_dir / RANKS_NAME),
            "model_sha256": RANKS_SHA256,
            "vocab_size": VOCAB_SIZE,
            "encoder": f"tiktoken {importlib.metadata.version('tiktoken')}",
        },
        "config": config,
        "splits": results,
    }


def _write_splits(
    documents: Iterator[tuple[str, str]],
    output: Path,
    tokenizer_dir: Path,
    valid_fraction: float,
    max_tokens: int,
) -> dict[str, dict[str, Any]]:
    """Write the tokens of (doc_id, text) and return each split's entry of the manifest."""
    encode = text_encoder(tokenizer_dir)
    results: dict[str, dict[str, Any]] = {}
    used = 0
    with ExitStack() as stack:
        writers: dict[str, IndexedWriter] = {}
        for split in SPLITS:
            (output / split).mkdir(parents=True)
            writers[split] = stack.enter_context(
                IndexedWriter(output / split / f"{TEXT_SCHEMA}_tokens", np.int32)
            )
            results[split] = {"rows": 0, "tokens": 0, "shards": []}
        for doc_id, text in documents:
            ids = np.append(_encoded(encode, doc_id, text).astype(np.int32), np.int32(EOD))
            if 0 <= max_tokens < used + ids.size:
                break
            split = split_of(doc_id, valid_fraction)
            writers[split].append(ids, [ids.size])
            results[split]["rows"] += 1
            results[split]["tokens"] += ids.size
            used += ids.size
        _require_splits(results, valid_fraction, max_tokens)
        for split, result in results.items():
            if result["rows"]:
                result["shards"].append(_finish(split, writers[split], result["rows"], result["tokens"]))
    for split in SPLITS:
        if not results[split]["rows"]:
            (output / split).rmdir()
    return results


def read_corpus(corpus: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs (doc_id, text) of a corpus, each shard verified by its sha256 before its first line is used.

    Raises:
        DataError: Naming the shard, and the line where there is one.
    """
    for shard in manifest["storage"]["shards"]:
        path = corpus / shard["path"]
        if not path.is_file():
            raise DataError(
                f"{path}: no such shard, though its manifest lists it; materialise healing_corpus again"
            )
        if (found := file_sha256(path)) != shard["sha256"]:
            raise DataError(
                f"{path}: sha256 is {found}, its manifest says {shard['sha256']}; "
                "materialise healing_corpus again"
            )
        rows = 0
        with path.open("rb") as stream:
            for rows, line in enumerate(stream, 1):
                try:
                    row = parse_json(line)
                    yield row["doc_id"], row["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {rows}: not a row of a corpus ({error!r})") from error
        if rows != shard["rows"]:
            raise DataError(f"{path}: {rows} rows, its manifest says {shard['rows']}")


@dataclass
class _CorpusCounts:
    nul_removed: int = 0
    blank: int = 0
    other_language: int = 0
    english_filter_applied: bool = False
    stopped_at_budget: bool = False


def _clean(documents: Iterator[Document], english_only: bool, counts: _CorpusCounts) -> Iterator[Document]:
    for document in documents:
        if english_only and document.language is not None:
            counts.english_filter_applied = True
            if document.language not in ENGLISH:
                counts.other_language += 1
                continue
        text = document.text
        if nuls := text.count("\0"):
            counts.nul_removed += nuls
            text = text.replace("\0", "")
        if not text.strip():
            counts.blank += 1
            continue
        yield Document(document.doc_id, text, document.language)


@dataclass
class _Shard:
    """One JSONL file in the making."""

    path: Path
    stream: BinaryIO
    rows: int = 0
    tokens: int = 0
    size: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, document: Document, tokens: int) -> None:
        row = {"doc_id": document.doc_id, "text": document.text}
        line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
        self.stream.write(line)
        self.digest.update(line)
        self.rows += 1
        self.tokens += tokens
        self.size += len(line)

    def close(self) -> dict[str, Any]:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return {
            "path": self.path.name,
            "sha256": self.digest.hexdigest(),
            "bytes": self.size,
            "rows": self.rows,
            "tokens": self.tokens,
        }


def _write_corpus(
    documents: Iterator[Document], output: Path, shard_rows: int, max_tokens: int, counts: _CorpusCounts
) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    used = 0
    shard: _Shard | None = None
    # The corpus depends on no artifact, so its tokens are counted with ranks of its own: verified by the
    # same sha256, they are the artifact's.
    with tempfile.TemporaryDirectory(prefix="o200k-") as ranks:
        write_tokenizer(Path(ranks))
        encode = text_encoder(Path(ranks))
        for document in documents:
            try:
                key = hashlib.blake2b(document.doc_id.encode("utf-8"), digest_size=16).digest()
            except UnicodeEncodeError as error:
                raise DataError(f"doc_id {document.doc_id!r} is not valid Unicode: {error.reason}") from error
            if key in seen:
                raise DataError(f"doc_id {document.doc_id!r} occurs twice; ids decide the split")
            seen.add(key)
            tokens = _encoded(encode, document.doc_id, document.text).size + 1
            if 0 <= max_tokens < used + tokens:
                counts.stopped_at_budget = True
                break
            used += tokens
            if shard is None:
                path = output / f"shard_{len(shards):05d}.jsonl"
                shard = _Shard(path, path.open("wb"))
            shard.add(document, tokens)
            if shard.rows == shard_rows:
                shards.append(shard.close())
                shard = None
    if shard is not None:
        shards.append(shard.close())
    return shards


def _encoded(
    encode: Callable[[str], npt.NDArray[np.uint32]], doc_id: str, text: str
) -> npt.NDArray[np.uint32]:
    try:
        return encode(text)
    except TextError as error:
        raise DataError(f"document {doc_id!r}: {error}; correct or remove it") from error


def _require_empty(directory: Path) -> None:
    if directory.exists() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty; remove what it holds, or choose another directory")
    directory.mkdir(parents=True, exist_ok=True)


def _require_splits(results: Mapping[str, Mapping[str, Any]], valid_fraction: float, max_tokens: int) -> None:
    expected = {"train": valid_fraction < 1, "valid": valid_fraction > 0}
    for split, wanted in expected.items():
        if wanted and not results[split]["rows"]:
            total = sum(result["rows"] for result in results.values())
            raise DataError(
                f"the {split} split is empty: {total} documents, valid_fraction {valid_fraction}, max_tokens "
                f"{max_tokens}; use more documents or another valid_fraction"
            )


def _finish(split: str, writer: IndexedWriter, rows: int, tokens: int) -> dict[str, Any]:
    data, index = writer.finish()
    name = f"{TEXT_SCHEMA}_tokens"
    return {
        "name": name,
        "rows": rows,
        "tokens": tokens,
        "paths": {"tokens.bin": f"{split}/{name}.bin", "tokens.idx": f"{split}/{name}.idx"},
        "bytes": {"tokens.bin": data.bytes, "tokens.idx": index.bytes},
        "sha256": {"tokens.bin": data.sha256, "tokens.idx": index.sha256},
    }
