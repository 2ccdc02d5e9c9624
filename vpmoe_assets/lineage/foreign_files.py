"""Files made by hand, looked at before they become an artifact: what they are, and what they may not be.

A file is known by what is in it, and its name has to agree. Only formats that hold data alone are known. A
pickle, whatever it is called, runs code when it is opened: it is told from the rest, and taken only by
somebody who says so.
"""

import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.indexed import HEADER_BYTES, unpack_header
from trainer.contract.json_text import JsonError, json_lines
from trainer.contract.safetensors_header import HeaderError, read_header
from vpmoe_assets.lineage.digest import file_sha256, safe_relative
from vpmoe_assets.lineage.errors import AdoptionError
from vpmoe_assets.lineage.filememory import Identity, identity

PICKLED = frozenset({".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
"""Names of files that are pickles, or hold one."""
_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_TOPK = b"vpTOPK"
_TEXTS = frozenset({"", ".txt", ".md", ".jinja", ".tiktoken", ".toml", ".yaml", ".yml", ".csv", ".tsv"})


@dataclass(frozen=True)
class ForeignFile:
    """One file.

    Attributes:
        path: Relative to the directory it will lie in, with `/`.
        source: Where it is.
        known_by: What it was known by when it was looked at: a later write is noticed.
        sha256: Of its contents; of a file beside the payload none is taken.
        pickle: Whether it is a pickle, or holds one.
    """

    path: str
    source: Path
    known_by: Identity
    sha256: str
    pickle: bool


@dataclass(frozen=True)
class Foreign:
    """What lies in a directory.

    Attributes:
        payload: The files that will be hashed and delivered.
        run: Files that say how they came about: of the directory that holds `payload/`.
        manifest: The manifest, if there is one.
        left: Names beside `payload/` that are not taken: directories, such as resume checkpoints.
    """

    payload: tuple[ForeignFile, ...]
    run: tuple[ForeignFile, ...]
    manifest: ForeignFile | None
    left: tuple[str, ...]

    @property
    def pickles(self) -> list[str]:
        """Files that are pickles, or hold one."""
        return [each.path for each in (*self.payload, *self.run) if each.pickle]


def look(directory: Path) -> Foreign:
    """Look at a directory: the payload itself, or what the trainer leaves, with a directory `payload`.

    Raises:
        AdoptionError: It holds links, devices, names that are not UTF-8, files of no known format or damaged
            ones, or nothing; says which, and what to do.
    """
    payload = directory / "payload"
    run: list[ForeignFile] = []
    left: list[str] = []
    manifest: ForeignFile | None = None
    if stat.S_ISDIR(_status(payload).st_mode) if os.path.lexists(payload) else False:
        files = [_file(path, name) for name, path in _walk(payload, payload)]
        for name in sorted(os.listdir(directory)):
            path = directory / name
            if name == "payload" or name.startswith("."):
                continue
            mode = _status(path).st_mode
            if stat.S_ISDIR(mode):
                left.append(name)
            elif stat.S_ISREG(mode):
                run.append(_file(path, name, hashed=False))
            else:
                raise AdoptionError(_special(path))
    else:
        payload = directory
        files = [_file(path, name) for name, path in _walk(directory, directory)]
    beside = run if payload != directory else files
    for each in [each for each in beside if each.path == "manifest.json"]:
        beside.remove(each)
        manifest = each
    _require_known(payload, files)
    return Foreign(tuple(files), tuple(run), manifest, tuple(left))


def _walk(top: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    for name in sorted(os.listdir(directory)):
        path = directory / name
        mode = _status(path).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(top, path)
        elif stat.S_ISREG(mode):
            yield safe_relative(path.relative_to(top).as_posix()), path
        else:
            raise AdoptionError(_special(path))


def _status(path: Path) -> os.stat_result:
    return path.lstat()


def _special(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a symbolic link (to {os.readlink(path)}): put the file itself there"
    return f"{path} is neither a file nor a directory; leave it out"


def _file(path: Path, name: str, *, hashed: bool = True) -> ForeignFile:
    known = identity(path.lstat())
    return ForeignFile(name, path, known, file_sha256(path) if hashed else "", _is_pickle(path))


def _is_pickle(path: Path) -> bool:
    if path.suffix.lower() in PICKLED:
        return True
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE_STARTS) and path.suffix != ".safetensors":
        return not (path.suffix == ".bin" and path.with_suffix(".idx").is_file())
    if start == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError):
            return False
    return False


def _require_known(top: Path, files: list[ForeignFile]) -> None:
    """Refuse what is of no known format, or damaged, and a directory in which nothing holds data."""
    data = 0
    for each in files:
        if each.pickle:
            data += 1
            continue
        suffix = each.source.suffix.lower()
        if suffix in _DATA:
            data += 1
            fault = _DATA[suffix](each.source)
        elif suffix == ".json":
            fault = _json_fault(each.source)
        elif suffix in _TEXTS:
            fault = _text_fault(each.source)
        else:
            fault = "is of no format that is known here"
        if fault:
            raise AdoptionError(f"{each.source} {fault}; known are {_KNOWN}, JSON and plain text beside them")
    if not data:
        raise AdoptionError(f"{top} holds no data of a format that is known here: {_KNOWN}")


def _safetensors_fault(path: Path) -> str:
    try:
        read_header(path)
    except HeaderError as error:
        return f"is damaged: {error}"
    return ""


def _index_fault(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES or not (header := unpack_header(start)).known:
        return "is no index of an IndexedDataset"
    if (size := path.stat().st_size) != header.file_bytes:
        return f"has {size} bytes, its header says {header.file_bytes}"
    return "" if path.with_suffix(".bin").is_file() else "has no .bin beside it"


def _elements_fault(path: Path) -> str:
    return "" if path.with_suffix(".idx").is_file() else "has no .idx beside it, and so no known format"


def _parquet_fault(path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(path).metadata  # noqa: B018 - read from the file's end
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return f"is no parquet file, or is cut off: {error}"
    return ""


def _json_lines_fault(path: Path) -> str:
    import orjson

    with path.open("rb") as file:
        try:
            for _ in json_lines(file, parse=orjson.loads):
                pass
        except JsonError as error:
            return str(error)
    return ""


def _topk_fault(path: Path) -> str:
    with path.open("rb") as file:
        return "" if file.read(len(_TOPK)) == _TOPK else "is no shard of a top-K store"


def _json_fault(path: Path) -> str:
    import orjson

    try:
        orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        return f"is no JSON: {error}"
    return ""


def _text_fault(path: Path) -> str:
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            if b"\0" in block:
                return "holds zero bytes, and is no text"
    return ""


_DATA: Mapping[str, Callable[[Path], str]] = {
    ".safetensors": _safetensors_fault,
    ".idx": _index_fault,
    ".bin": _elements_fault,
    ".parquet": _parquet_fault,
    ".jsonl": _json_lines_fault,
    ".topk": _topk_fault,
}
_KNOWN = "safetensors, .bin with .idx, parquet, JSON lines and top-K shards"
