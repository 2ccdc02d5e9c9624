"""Where the documents of the healing corpus come from: prose shipped with Python, a folder, or the hub."""

import codecs
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.json_text import JsonError, json_lines
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.rows import damaged, open_parquet
from vpmoe_assets.hub import HubClient, HubFile, HuggingFaceHub, fetch, require_commit, select_files
from vpmoe_assets.input_files import TEXT_SUFFIXES, input_files
from vpmoe_assets.lineage.digest import file_sha256

if TYPE_CHECKING:
    from trainer.contract.schema.sources import HubText, PydocTopics, TextFolder

TEXT_FIELDS = ("text", "content")
ID_FIELDS = ("doc_id", "document_id", "id", "uuid")
LANGUAGE_FIELDS = ("language", "lang", "language_code")
ENGLISH = frozenset({"en", "eng", "english"})


@dataclass(frozen=True)
class Document:
    """A document as the source gives it; `language` is None where the source has no such field."""

    doc_id: str
    text: str
    language: str | None = None


@dataclass(frozen=True)
class DocumentSource:
    """Documents in a fixed order, and what identifies them."""

    identity: dict[str, Any]
    documents: Callable[[], Iterator[Document]]


def pydoc_topics(source: "PydocTopics") -> DocumentSource:
    """Return the language reference by topic, as `pydoc_data.topics` of the running Python holds it.

    Its text changes with the patch release of Python, so the version and a digest of the text are recorded.
    """
    from pydoc_data.topics import topics

    texts = dict(sorted(topics.items()))
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True, ensure_ascii=True).encode())
    identity = {
        "kind": "pydoc_topics",
        "description": "Prose of pydoc_data.topics, the Python language reference by topic; not FineWeb-Edu.",
        "python_version": platform.python_version(),
        "source_sha256": digest.hexdigest(),
        "document_chars": source.document_chars,
    }

    def documents() -> Iterator[Document]:
        for topic, text in texts.items():
            for part, piece in enumerate(split_paragraphs(text, source.document_chars)):
                yield Document(f"pydoc/{topic}/{part:03d}", piece)

    return DocumentSource(identity, documents)


def split_paragraphs(text: str, most: int) -> list[str]:
    """Pieces of at most `most` characters, cut only at blank lines; a longer paragraph stays whole."""
    pieces: list[str] = []
    for paragraph in text.split("\n\n"):
        if pieces and len(pieces[-1]) + 2 + len(paragraph) <= most:
            pieces[-1] += f"\n\n{paragraph}"
        else:
            pieces.append(paragraph)
    return pieces


def folder(source: "TextFolder") -> DocumentSource:
    """Files `*.jsonl` and `*.txt` below a folder, in order of their paths.

    Raises:
        DataError: No such folder, or no such file in it.
    """
    root = Path(source.path)
    files = input_files(root, TEXT_SUFFIXES, deep=True)
    if not files:
        raise DataError(f"sources.healing_corpus.path: {root} holds no .jsonl or .txt file")
    listed = [{"name": path.relative_to(root).as_posix(), "sha256": file_sha256(path)} for path in files]
    identity = {"kind": "folder", "description": "Text files of a local folder.", "files": listed}

    def documents() -> Iterator[Document]:
        row = 0
        for path, entry in zip(files, listed, strict=True):
            name = entry["name"]
            if path.suffix == ".txt":
                yield Document(name, _read_text(path, entry["sha256"]))
                row += 1
                continue
            for number, fields in _json_lines(path, entry["sha256"]):
                yield document_of(fields, row, f"{name}, line {number}")
                row += 1

    return DocumentSource(identity, documents)


def hub_text(source: "HubText", cache: Path, client: HubClient | None = None) -> DocumentSource:
    """Parquet files of a published corpus at one commit, fetched one by one as the documents are asked for.

    Args:
        source: Repository, commit, split and optional pins.
        cache: Where downloads are kept between attempts.
        client: Of the hub; the public one by default.

    Raises:
        HubError: The revision is no commit, the hub cannot be reached, or the commit is not what was pinned.
    """
    require_commit(source.repo, source.revision, "sources.healing_corpus.revision")
    hub: HubClient = client if client is not None else HuggingFaceHub()
    listing = hub.list_files(source.repo, "dataset", source.revision)
    files = select_files(listing, source.files, pattern=f"data/*{source.split}*.parquet")
    identity = {
        "kind": "hub",
        "description": f"{source.repo} at {source.revision}, split {source.split}, from its first file on.",
        "repo": source.repo,
        "revision": source.revision,
        "split": source.split,
        "files": [{"name": file.path, "sha256": file.sha256} for file in files],
    }

    def documents() -> Iterator[Document]:
        row = 0
        for file in files:
            for fields in _parquet_rows(_fetched(hub, source, file, cache)):
                yield document_of(fields, row, f"{file.path}, row {row}")
                row += 1

    return DocumentSource(identity, documents)


def document_of(fields: Mapping[str, Any], row: int, where: str) -> Document:
    """Return a document from a row: the first text field and the first id field it has.

    Args:
        fields: Of the row.
        row: Its number in the whole source, part of the id of a row that brings none.
        where: Of the row, for messages.

    Raises:
        DataError: No text field, or one that is not text.
    """
    name = next((field for field in TEXT_FIELDS if field in fields), None)
    if name is None:
        raise DataError(
            f"{where}: has {', '.join(fields) or 'no fields'}; expected one of {', '.join(TEXT_FIELDS)}"
        )
    text = fields[name]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{where}: field {name!r} is {type(text).__name__}, expected text")
    given = next((fields[field] for field in ID_FIELDS if fields.get(field) not in (None, "")), None)
    doc_id = str(given) if given is not None else f"{row}_{hashlib.sha256(_utf8(text, where)).hexdigest()}"
    language = next((fields[field] for field in LANGUAGE_FIELDS if field in fields), None)
    return Document(doc_id, text, None if language is None else str(language).lower())


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text is not valid Unicode ({error.reason} at {error.start})"
        ) from error


def _read_text(path: Path, sha256: str) -> str:
    """Return a file's text without byte order mark, its lines ended by line feeds."""
    content = path.read_bytes()
    _require_same(path, hashlib.sha256(content).hexdigest(), sha256)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16, by its first bytes; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): {error.reason}; save it so") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(path: Path, sha256: str) -> Iterator[tuple[int, dict[str, Any]]]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        try:
            # Parsed as bytes: a byte order mark is passed over.
            for number, fields in json_lines(stream, seen=digest.update):
                if not isinstance(fields, dict):
                    found = type(fields).__name__
                    raise DataError(f"{path}, line {number}: a JSON {found}, expected an object")
                yield number, fields
        except JsonError as error:
            raise DataError(f"{path}, {error}") from error
    _require_same(path, digest.hexdigest(), sha256)


def _require_same(path: Path, found: str, sha256: str) -> None:
    if found != sha256:
        raise DataError(f"{path} has changed while it was read; start again when nothing writes to it")


def _fetched(hub: HubClient, source: "HubText", file: HubFile, cache: Path) -> Path:
    return fetch(hub, source.repo, "dataset", source.revision, file, cache)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    known: Sequence[str] = (*TEXT_FIELDS, *ID_FIELDS, *LANGUAGE_FIELDS)
    with open_parquet(path) as parquet:
        names = parquet.schema_arrow.names
        if doubled := [name for name in known if names.count(name) > 1]:
            raise DataError(
                f"{path} has the column {doubled[0]} {names.count(doubled[0])} times; expected once"
            )
        columns = [name for name in known if name in names]
        try:
            for batch in parquet.iter_batches(1024, columns=columns, use_threads=False):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: a column holds bytes that are not UTF-8 ({error})") from error
