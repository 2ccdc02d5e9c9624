"""Every parser of what comes from outside: good files to begin with, how it is read, what it may raise."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.hostile.inputs import (
    RAW_JSON,
    as_json,
    changed_bytes,
    changed_values,
    json_files,
    odd_values,
)
from tests.lineage.fabricate import draft, index_of, recipe
from tests.trainer.contract.topk.distributions import ADAPTIVE, IDENTITY, records
from trainer.contract.attempts import read_attempts
from trainer.contract.canonical import canonical_json, sha256_json
from trainer.contract.safetensors_header import HeaderError, read_header
from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.experiment import CONFIGS_DIR, load_experiment
from trainer.contract.schema.job import load_job
from trainer.contract.topk.block import decode, encode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.ids import count_table, pack_table, unpack_table
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.shard_file import END, FRAME_BYTES, pack_frame
from trainer.contract.topk.shard_reader import TopKShard
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.writer import TopKShardWriter
from vpmoe_assets.codebase.snapshot import SnapshotError, pack, unpack
from vpmoe_assets.donors.checkpoints import read_config, read_weight_map
from vpmoe_assets.errors import DataError, DonorError, RowError
from vpmoe_assets.evaluation.published import zip_tasks
from vpmoe_assets.evaluation.tasks import TASKS
from vpmoe_assets.harmony.conversation import parse_messages, validate
from vpmoe_assets.harmony.indexed import map_elements, read_index
from vpmoe_assets.harmony.rows import inspect_file, read_batches
from vpmoe_assets.lineage.digest import FileEntry, merkle_root
from vpmoe_assets.lineage.errors import AdoptionError, LineageError, RecordError
from vpmoe_assets.lineage.foreign_files import look
from vpmoe_assets.lineage.record import Record, read_record
from vpmoe_assets.lineage.statements import Statement, StatementError, Statements
from vpmoe_assets.resources.launcher_settings import FILE_ENV, settings_of
from vpmoe_assets.resources.slurm.settings import SlurmSettings
from vpmoe_assets.text.documents import document_of, folder


@dataclass(frozen=True)
class Parser:
    """A parser, and what is given to it.

    Attributes:
        name: For the table.
        inputs: What it is given; a strategy, made when it is first asked for.
        read: Reads one of them, with a folder of its own; checks what it returns, where that can be checked.
        errors: What it may raise.
    """

    name: str
    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], object]
    errors: tuple[type[Exception], ...]


def _put(folder_: Path, name: str, content: bytes) -> Path:
    path = folder_ / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- safetensors -------------------------------------------------------------------------------------

_TENSORS = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def _safetensors() -> st.SearchStrategy[bytes]:
    def file(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + bytes(32)

    return st.one_of(json_files(_TENSORS).map(file), changed_bytes(file(as_json(_TENSORS))))


def _read_safetensors(content: bytes, where: Path) -> None:
    path = _put(where, "x.safetensors", content)
    for entry in read_header(path).entries.values():
        assert type(entry.start) is type(entry.stop) is int
        assert 0 <= entry.start <= entry.stop <= len(content)
        assert all(type(size) is int and size >= 0 for size in entry.shape)


# --- IndexedDataset ----------------------------------------------------------------------------------


def _read_index(content: bytes, where: Path) -> None:
    index = read_index(_put(where, "x.idx", content))
    assert (index.lengths >= 0).all()
    _put(where, "x.bin", bytes(20))
    map_elements(where / "x", index)


# --- top-K store -------------------------------------------------------------------------------------


@cache
def _block(adaptive: bool) -> tuple[Any, bytes, bytes, int]:
    """Return identity, columns and table of a block, and how many positions it has."""
    identity = ADAPTIVE if adaptive else IDENTITY
    made = records(np.random.default_rng(0), 40, identity)
    table = count_table(identity.vocabulary, made.ids, made.draws)
    content = encode(made, table, identity.logprob_error, adaptive)
    return identity, content, pack_table(table), len(made)


def _blocks() -> st.SearchStrategy[tuple[bool, bytes, int]]:
    tokens = st.one_of(st.just(40), st.integers(0, 2**32 - 1), st.sampled_from((0, 39, 41, 1 << 20)))
    return st.booleans().flatmap(
        lambda adaptive: st.tuples(st.just(adaptive), changed_bytes(_block(adaptive)[1]), tokens)
    )


def _read_block(given: tuple[bool, bytes, int], where: Path) -> None:
    adaptive, content, tokens = given
    identity, _, table, _ = _block(adaptive)
    found = decode(
        memoryview(content),
        tokens,
        identity.topk,
        identity.tail_draws,
        unpack_table(memoryview(table), identity.vocabulary),
        identity.logprob_error,
        adaptive,
    )
    assert len(found) == tokens
    assert (found.ids < identity.vocabulary).all()


def _read_table(content: bytes, where: Path) -> None:
    table = unpack_table(memoryview(content), IDENTITY.vocabulary)
    assert sorted(table.order.tolist()) == list(range(IDENTITY.vocabulary))


@cache
def _shard(where: Path) -> bytes:
    """Return a shard of three blocks."""
    path = where / "good.topk"
    path.unlink(missing_ok=True)
    writer = TopKShardWriter(path, IDENTITY, split="train", shard=0)
    rng = np.random.default_rng(0)
    for sequence in range(0, 30, 3):
        writer.add(sequence, records(rng, int(rng.integers(1, 30)), IDENTITY))
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return content


def _shards() -> st.SearchStrategy[Any]:
    return st.tuples(
        st.sampled_from(("header", "index", "index", "block", "block", "bytes")),
        st.sampled_from(("bytes", "value")),
        st.data(),
    )


def _resealed(content: bytes, given: tuple[str, str, Any]) -> bytes:
    """Change a part of a shard, and put its checksum right."""
    what, how, data = given
    magic, size, _ = struct.unpack_from("<8sII", content)
    begin = 16 + size
    if what == "header":
        value = json.loads(content[16:begin])
        head = data.draw(json_files(value) if how == "value" else changed_bytes(content[16:begin]))
        return struct.pack("<8sII", magic, len(head), zlib.crc32(head)) + head + content[begin:]
    if what == "bytes":
        return data.draw(changed_bytes(content))
    (offset,) = struct.unpack_from("<Q", content, len(content) - END.size)
    at = offset if what == "index" else begin
    tag, length, first, sequences, tokens = struct.unpack_from("<4sIQII", content, at)
    payload = data.draw(changed_bytes(content[at + FRAME_BYTES : at + FRAME_BYTES + length]))
    if how == "value":
        first, sequences, tokens = (data.draw(st.integers(0, 2**32 - 1)) for _ in range(3))
    frame = pack_frame(tag, payload, first, sequences, tokens)
    rest = content[at + FRAME_BYTES + length :]
    moved = len(frame) - FRAME_BYTES - length
    if what != "index" and moved:  # the index stands elsewhere then
        rest = rest[: -END.size] + END.pack(offset + moved, rest[-8:])
    return content[:at] + frame + rest


def _read_shard(given: tuple[str, str, Any], where: Path) -> None:
    path = _put(where, "shard_00.topk", _resealed(_shard(where), given))
    shard = TopKShard(path, IDENTITY, split="train", shard=0)
    for block in range(shard.blocks):
        shard.read_block(block)
        shard.verify_block(block)


@cache
def _store_manifest(where: Path) -> dict[str, Any]:
    content = _shard(where)
    entry = {"name": "shard_00.topk", "shard": 0, "sequences": 10, "tokens": 100, "bytes": len(content)}
    entries = {"train": [entry | {"sha256": "0" * 64}], "valid": []}
    return json.loads(
        json.dumps(write_manifest(where, IDENTITY, entries, {"reasoning": -1.5, "final": -0.5}))
    )


def _bound(manifest: Any) -> Any:
    """Bind a changed manifest to what it says now."""
    keys = IDENTITY.document.keys()
    return {**manifest, "binding": sha256_json({key: manifest[key] for key in keys})}


def _store_manifests() -> st.SearchStrategy[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        return json_files(_store_manifest(Path(where)), _bound)


def _read_store(content: bytes, where: Path) -> None:
    _put(where, "train/shard_00.topk", _shard(where))
    _put(where, "store.json", content)
    TopKStore(where).verify()


# --- records, statements -----------------------------------------------------------------------------


@cache
def _record() -> dict[str, Any]:
    fingerprint, payload = recipe("base", variant=0)
    made = Record.model_validate(
        draft(payload).model_dump(by_alias=True)
        | {
            "experiment": "smoke",
            "asset": "base",
            "version": "v1-" + fingerprint[:8],
            "sequence": 1,
            "published_utc": "2026-01-31T11:01:30+00:00",
            "fingerprint": fingerprint,
            "files": (FileEntry("a/b.bin", 3, "d" * 64),),
            "digest": merkle_root([FileEntry("a/b.bin", 3, "d" * 64)]),
        }
    )
    return {**json.loads(canonical_json(made.to_dict())), "record_digest": made.record_digest}


def _digested(fields: Any) -> Any:
    rest = {key: value for key, value in fields.items() if key != "record_digest"}
    rest["fingerprint"] = sha256_json(rest["fingerprint_payload"])
    rest["digest"] = merkle_root([FileEntry(**entry) for entry in rest["files"]])
    return {**rest, "record_digest": sha256_json(rest)}


def _read_record(content: bytes, where: Path) -> None:
    read_record(_put(where, ".artifact.json", content)).to_dict()


@cache
def _statement() -> dict[str, Any]:
    made = Statement(
        kind="pinned",
        record="a" * 64,
        artifact="smoke/base/v1",
        time="2026-01-31T11:00:00+00:00",
        author="a@b",
        body={"why": [1, 2.5, None]},
    )
    return {**made.model_dump(by_alias=True), "id": made.id}


def _identified(fields: Any) -> Any:
    rest = {key: value for key, value in fields.items() if key != "id"}
    return {**rest, "id": sha256_json(rest)}


def _read_statements(content: bytes, where: Path) -> None:
    _put(where, f"smoke/base/{'a' * 64}.jsonl", content)
    Statements(where).about_digest("smoke", "base", "a" * 64)


# --- configs -----------------------------------------------------------------------------------------

_ODD_TOML = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 5000,
        "[" * 5000,
        "{a=" * 3000,
        "[]",
        "{}",
        '""',
        "true",
        "-1",
        "0",
    ),
    *(
        "1979-05-27T07:32:00Z",
        "99:99:99",
        '"\\ud800"',
        '"""',
        "'../../x'",
        "0x" + "f" * 300,
        "[[1],[2]]",
        "1.5",
    ),
)


def _tomls(text: str) -> st.SearchStrategy[bytes]:
    """A config with a value, a key or bytes changed."""
    lines = text.splitlines()
    set_ = [number for number, line in enumerate(lines) if " = " in line]

    def change(number: int, value: str, key: str | None) -> bytes:
        name = lines[number].partition(" = ")[0] if key is None else key
        changed = [*lines[:number], f"{name} = {value}", *lines[number + 1 :]]
        return "\n".join(changed).encode("utf-8", "surrogatepass")

    keys = st.one_of(
        st.none(), st.none(), st.sampled_from(("a." * 3000 + "b", '"\\u0000"', "kind", "extends", "''"))
    )
    values = st.one_of(
        st.sampled_from(_ODD_TOML),
        odd_values().filter(lambda value: value is not None).map(json.dumps),
    )
    return st.one_of(
        st.builds(change, st.sampled_from(set_), values, keys),
        changed_bytes(text.encode("utf-8"), (1,)),
        st.sampled_from((b"[" * 100_000, b"a = " + b"[" * 100_000, b"\xff", b"[a]\n[a]", b"a.b=1\na=2", b"")),
        st.text(max_size=40).map(str.encode),
    )


def _experiments() -> st.SearchStrategy[bytes]:
    return _tomls((CONFIGS_DIR / "smoke.toml").read_text(encoding="utf-8"))


def _read_experiment(content: bytes, where: Path) -> None:
    load_experiment(str(_put(where, "smoke.toml", content)))


_LAUNCHERS = '[launcher.slurm]\npartition = "gpu"\ntime_limit = "1:00:00"\n'


def _read_launchers(content: bytes, where: Path) -> None:
    path = _put(where, "launchers.toml", content)
    settings_of("slurm", SlurmSettings, {}, {FILE_ENV: str(path)})


@cache
def _job() -> dict[str, Any]:
    return {
        "schema": "vpmoe.job/1",
        "command": "convert",
        "asset": "vpdense0_5_28",
        "experiment": "smoke",
        "recipe": plain(load_experiment("smoke").convert_recipe("vpdense0_5_28")),
        "recipe_fingerprint": "f",
        "seed": 1,
        "inputs": {
            "qwen3_0_6b_o200k": {"path": "/a", "digest": "d"},
            "healing_text_v1": {"path": "/b", "digest": "d"},
        },
        "execution": {"device": "cpu"},
        "provenance": {"git_sha": "a", "git_dirty": False, "source_digest": "b", "lock_digest": "c"},
        "work_dir": "/w",
        "output_dir": "/o",
    }


# --- rows --------------------------------------------------------------------------------------------

_ROW = {"doc_id": "a", "text": "häßlich", "language": "en"}


def _json_lines() -> st.SearchStrategy[bytes]:
    return st.lists(json_files(_ROW), min_size=1, max_size=3).map(b"\n".join)


def _read_documents(content: bytes, where: Path) -> None:
    from trainer.contract.schema.sources import TextFolder

    _put(where, "rows/x.jsonl", content)
    for document in folder(TextFolder(kind="folder", path=str(where / "rows"))).documents():
        assert isinstance(document.text, str)


def _read_fields(fields: Any, where: Path) -> None:
    assert isinstance(document_of(fields, 0, "here").text, str)


_MESSAGES = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "channel": "analysis", "content": [{"type": "text", "text": "r"}]},
        {"role": "assistant", "channel": "final", "content": [{"type": "text", "text": "a"}]},
    ]
}


def _read_messages(content: bytes, where: Path) -> None:
    turn = validate(parse_messages(content.decode("utf-8", "surrogateescape")))
    for text in (turn.user, turn.analysis, turn.final):
        text.encode("utf-8")


@cache
def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer", "language")
    buffer = io.BytesIO()
    rows = {name: [f"{name} {number}" for number in range(20)] for name in names}
    pq.write_table(pa.table(rows), buffer, row_group_size=7, write_page_checksum=False)
    return buffer.getvalue()


def _parquets() -> st.SearchStrategy[bytes]:
    content = _parquet()
    tail = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    head, foot = content[:tail], content[tail:-8]

    def file(footer: bytes) -> bytes:
        return head + footer + len(footer).to_bytes(4, "little") + b"PAR1"

    return st.one_of(changed_bytes(content), changed_bytes(foot, (1,), 2).map(file))


def _read_parquet(content: bytes, where: Path) -> None:
    path = _put(where, "x.parquet", content)
    required = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
    file = inspect_file(path, required, sha256="0" * 64)
    for batch in read_batches([file], (*required, "language"), 0, min(file.rows, 100)):
        assert len(batch)


# --- archives ----------------------------------------------------------------------------------------

_ROWS = {
    "multiple_choice": {"query": "q é", "choices": ["a", "b"], "gold": 1},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a b", "continuation": "c"},
}


def _bundle(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


@cache
def _members() -> dict[str, bytes]:
    lines = [f"{task.label},x,{task.baseline_percent + 1}" for task in TASKS]
    table = "\r\n".join(["Eval Task,Task Category,Random baseline", *lines]).encode()
    files = {f"eval_bundle/eval_data/{task.uri}": as_json(_ROWS[task.type]) + b"\n" for task in TASKS}
    return {"eval_bundle/eval_meta_data.csv": table} | files


def _bundles() -> st.SearchStrategy[bytes]:
    members = _members()

    def member(name: str) -> st.SearchStrategy[bytes]:
        raw = st.one_of(changed_bytes(members[name], (1,)), st.sampled_from(RAW_JSON))
        return raw.map(lambda content: _bundle(members | {name: content}))

    stored, packed = _bundle(members, zipfile.ZIP_STORED), _bundle(members)
    ends = st.one_of(changed_bytes(packed[-600:]).map(lambda end: packed[:-600] + end))
    return st.one_of(
        st.sampled_from(list(members)).flatmap(member), changed_bytes(stored), changed_bytes(packed), ends
    )


def _read_bundle(content: bytes, where: Path) -> None:
    for task in zip_tasks(_put(where, "x.zip", content)):
        assert all(isinstance(row, dict) for row in task.rows)


def _snapshots() -> st.SearchStrategy[bytes]:
    import gzip

    packed = pack({"a/b.py": b"x = 1\n" * 50, "c.toml": b"", "d/e/f.py": b"pass\n"})
    plain_ = gzip.decompress(packed)
    return st.one_of(
        changed_bytes(plain_).map(lambda tar: gzip.compress(tar, 1)),
        changed_bytes(packed),
        st.tuples(
            st.sampled_from(("../x", "/x", "a/../../x", "a//b", "./x", "a\\b", "é" * 200, "")),
            st.binary(max_size=9),
        ).map(lambda file: _tar(*file)),
    )


def _tar(name: str, content: bytes) -> bytes:
    import gzip
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)[
            : 1 + len(content) % 4
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue())


def _read_snapshot(content: bytes, where: Path) -> None:
    for path in unpack(content):
        assert not path.startswith("/")
        assert ".." not in path.split("/")


# --- directories made elsewhere ----------------------------------------------------------------------


def _foreign() -> st.SearchStrategy[tuple[str, bytes]]:
    index = index_of()
    return st.one_of(
        st.tuples(st.just("x.safetensors"), _safetensors()),
        st.tuples(st.just("x.idx"), changed_bytes(index)),
        st.tuples(st.just("x.jsonl"), _json_lines()),
        st.tuples(st.just("x.json"), json_files(_TENSORS)),
        st.tuples(st.just("x.parquet"), _parquets()),
        st.tuples(st.sampled_from(("x.pt", "x.bin", "x.zip", "x.txt", "x", "x.topk")), _bundles()),
    )


def _read_foreign(given: tuple[str, bytes], where: Path) -> None:
    name, content = given
    _put(where, f"in/{name}", content)
    _put(where, "in/x.bin", bytes(20))
    try:
        look(where / "in")
    finally:
        (where / "in" / name).unlink()


def _read_donor_config(content: bytes, where: Path) -> None:
    _put(where, "config.json", content)
    read_config(where)


def _read_weight_map(content: bytes, where: Path) -> None:
    for file in read_weight_map(_put(where, "model.safetensors.index.json", content)).values():
        assert (where / file).parent == where


_WEIGHT_MAP = {
    "metadata": {"total_size": 9},
    "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
}


# --- what a killed process leaves --------------------------------------------------------------------

_ATTEMPT = {"started_utc": "2026-01-31T11:00:00.000+00:00", "resumed_from": None, "sources": "a" * 64}


def _read_attempts(content: bytes, where: Path) -> None:
    for attempt in read_attempts(_put(where, "attempts.jsonl", content)):
        assert isinstance(attempt.started_utc, str)


def _attempts() -> st.SearchStrategy[bytes]:
    return st.lists(json_files(_ATTEMPT), min_size=1, max_size=3).map(b"\n".join)


PARSERS = (
    Parser("safetensors header", _safetensors, _read_safetensors, (HeaderError,)),
    Parser("IndexedDataset index", lambda: changed_bytes(index_of()), _read_index, (DataError,)),
    Parser("top-K block", _blocks, _read_block, (StoreError,)),
    Parser("top-K table", lambda: changed_bytes(_block(False)[2]), _read_table, (StoreError,)),
    Parser("top-K shard", _shards, _read_shard, (StoreError,)),
    Parser("top-K manifest", _store_manifests, _read_store, (StoreError,)),
    Parser("record", lambda: json_files(_record(), _digested), _read_record, (RecordError, LineageError)),
    Parser(
        "statements",
        lambda: json_files(_statement(), _identified).map(lambda line: line + b"\n"),
        _read_statements,
        (StatementError,),
    ),
    Parser("experiment TOML", _experiments, _read_experiment, (ConfigError,)),
    Parser("launchers TOML", lambda: _tomls(_LAUNCHERS), _read_launchers, (ConfigError,)),
    Parser(
        "job file",
        lambda: json_files(_job()),
        lambda content, where: load_job(_put(where, "job.json", content)),
        (ConfigError,),
    ),
    Parser("JSON lines of text", _json_lines, _read_documents, (DataError,)),
    Parser(
        "row of text",
        lambda: changed_values(_ROW).filter(lambda row: isinstance(row, dict)),
        _read_fields,
        (DataError,),
    ),
    Parser("messages", lambda: json_files(_MESSAGES), _read_messages, (RowError,)),
    Parser("parquet rows", _parquets, _read_parquet, (DataError,)),
    Parser("evaluation zip", _bundles, _read_bundle, (DataError,)),
    Parser("snapshot of sources", _snapshots, _read_snapshot, (SnapshotError,)),
    Parser("adopted directory", _foreign, _read_foreign, (AdoptionError,)),
    Parser("donor's config", lambda: json_files({"model_type": "qwen3"}), _read_donor_config, (DonorError,)),
    Parser("donor's weight map", lambda: json_files(_WEIGHT_MAP), _read_weight_map, (DonorError,)),
    Parser("attempts", _attempts, _read_attempts, ()),
)
"""All of them."""
