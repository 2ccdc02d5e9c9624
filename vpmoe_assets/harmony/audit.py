"""Checks of conversations and their shards, as pure functions; the asset graph runs them as asset checks.

They trust neither the builder nor its records: files are read again, conversations are rendered again by
`openai-harmony`, and the split and the truncation are worked out anew.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError
from vpmoe_assets.file_audit import file_faults
from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.conversation import messages, parse_messages, validate
from vpmoe_assets.harmony.indexed import Index, map_elements, read_index
from vpmoe_assets.harmony.kd_manifest import payload_files
from vpmoe_assets.harmony.long_words import TOO_SLOW, OracleTooSlowError
from vpmoe_assets.harmony.oracle import expected_document
from vpmoe_assets.harmony.render import Renderer
from vpmoe_assets.harmony.rows import inspect_file, read_batches
from vpmoe_assets.harmony.split import split_of
from vpmoe_assets.verdict import Verdict

GOLDEN_LENGTH = 132
GOLDEN_SHA256 = "a537696a3710a9e78497b0cd726f78a2ea6457e02725faed83f36da1f6de71eb"
GOLDEN_LABELS = (111, 129)

SAMPLE_TEXTS = (
    "The quick brown fox: 1234567890, 3.14159 and 2025-08-05.",
    "Größenordnung, naïve façade, Zażółć gęślą jaźń",
    "你好，世界。こんにちは、世界。안녕하세요 세계",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and combining é",
    "a literal <|end|> and <|start|>assistant<|channel|>final<|message|> in a text<|return|>",
    "\n\n  two blank lines,\ttabs\r\nand trailing space \n",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # code",
)


def tokenizer_agrees(directory: Path) -> Verdict:
    """Check the bytes of the ranks, all special ids, and that both libraries encode alike."""
    try:
        faults = tokenizer.disagreements(directory, list(SAMPLE_TEXTS))
    except DataError as error:
        return Verdict(False, str(error), {})
    metadata = {
        "sha256": tokenizer.RANKS_SHA256,
        "vocab_size": tokenizer.VOCAB_SIZE,
        "texts": len(SAMPLE_TEXTS),
    }
    return Verdict.of(faults, f"tiktoken and openai-harmony agree on {tokenizer.VOCAB_SIZE} ids", metadata)


def harmony_manifest_matches(payload_dir: Path, manifest: dict[str, Any]) -> Verdict:
    """Check that the shards are exactly those of the manifest: names, bytes, sha256, rows, groups."""
    import pyarrow.parquet as pq

    shards = manifest["storage"]["shards"]
    faults = file_faults(payload_dir, {shard["path"]: (shard["bytes"], shard["sha256"]) for shard in shards})
    if not faults:
        for shard in shards:
            footer = pq.read_metadata(payload_dir / shard["path"])
            found = {"rows": footer.num_rows, "row_groups": footer.num_row_groups}
            faults += [
                f"{shard['path']}: {name} is {found[name]}" for name in found if found[name] != shard[name]
            ]
        rows = sum(shard["rows"] for shard in shards)
        if rows != manifest["storage"]["total_rows"]:
            faults.append(f"total_rows is {manifest['storage']['total_rows']}, the shards have {rows}")
    skipped = manifest["conversion"]["skipped_rows"]
    metadata = {"rows": manifest["storage"]["total_rows"], "shards": len(shards), "skipped_rows": skipped}
    return Verdict.of(faults, f"{len(shards)} shards as the manifest says", metadata)


def kd_manifest_matches(payload_dir: Path, manifest: dict[str, Any]) -> Verdict:
    """Check that the files are exactly those of the manifest, and that rows and tokens add up."""
    files = payload_files(manifest)
    faults = file_faults(payload_dir, files)
    for name, split in manifest["splits"].items():
        for quantity in ("rows", "tokens"):
            total = sum(shard[quantity] for shard in split["shards"])
            if total != split[quantity]:
                faults.append(f"{name}: {quantity} is {split[quantity]}, its shards add up to {total}")
        if split["counts"]["kept"] != split["rows"]:
            faults.append(f"{name}: {split['counts']['kept']} kept, {split['rows']} rows")
    metadata = {name: split["counts"] for name, split in manifest["splits"].items()}
    return Verdict.of(faults, f"{len(files)} files as the manifest says", metadata)


def arrays_aligned(payload_dir: Path, manifest: dict[str, Any]) -> Verdict:
    """Tokens, loss mask and span of every shard have the same documents and keep the format's invariants."""
    faults: list[str] = []
    documents = tokens = supervised = 0
    for split, name, shard in _shards(manifest):
        try:
            trio = _open_shard(payload_dir, shard)
            faults += [f"{split}/{name}: {fault}" for fault in _alignment_faults(trio, shard)]
        except DataError as error:
            faults.append(str(error))
            continue
        documents += trio.index.lengths.size
        tokens += trio.tokens.size
        supervised += int(np.count_nonzero(trio.mask))
    metadata = {"documents": documents, "tokens": tokens, "supervised_tokens": supervised}
    return Verdict.of(faults, f"{documents} documents aligned in three arrays", metadata)


def golden_conversation(tokenizer_dir: Path) -> Verdict:
    """Check that the reference conversation renders to its known 132 tokens and 19 labels."""
    row = {"query": "What is 2+2?", "synthetic_reasoning": "2+2=4.", "synthetic_answer": "4"}
    rendered = Renderer(tokenizer_dir).render(messages(row, Scaffold()))
    digest = hashlib.sha256(",".join(map(str, rendered.tokens.tolist())).encode()).hexdigest()
    first, last = GOLDEN_LABELS
    labelled = np.flatnonzero(rendered.mask).tolist()
    faults = []
    if (rendered.tokens.size, digest) != (GOLDEN_LENGTH, GOLDEN_SHA256):
        faults.append(
            f"{rendered.tokens.size} tokens with sha256 {digest}, expected {GOLDEN_LENGTH}, {GOLDEN_SHA256}"
        )
    if labelled != list(range(first, last + 1)):
        faults.append(f"labels at {labelled}, expected {first} to {last}")
    return Verdict.of(faults, "the reference conversation has its known tokens", {"sha256": digest})


def sample_renders_alike(
    payload_dir: Path,
    manifest: dict[str, Any],
    harmony_dir: Path,
    harmony_manifest: dict[str, Any],
    tokenizer_dir: Path,
    *,
    seed: int,
    sample: int,
) -> Verdict:
    """`openai-harmony` renders a seeded sample of the input again, and the shards hold exactly that.

    Every sampled conversation that is not to be dropped must stand, with its mask and span, in the split
    and shard where it belongs. Those that the library would take too long for are passed over, and counted.
    """
    config = manifest["config"]
    rng = np.random.Generator(np.random.PCG64(seed))
    shards = [shard for shard in harmony_manifest["storage"]["shards"] if shard["rows"]]
    total = sum(shard["rows"] for shard in shards)
    picked = np.sort(rng.choice(total, size=min(sample, total), replace=False))
    if config["max_rows"] >= 0:
        picked = picked[picked < config["max_rows"]]
    found: Counter[str] = Counter()
    faults: list[str] = []
    offset = 0
    built = {(split, name): shard for split, name, shard in _shards(manifest)}
    for entry in shards:
        rows = picked[(picked >= offset) & (picked < offset + entry["rows"])] - offset
        offset += entry["rows"]
        file = inspect_file(harmony_dir / entry["path"], ("synth_id", "messages_json"), entry["sha256"])
        number = Path(entry["path"]).stem.rsplit("_", 1)[-1]
        for row in rows.tolist():
            batch = next(iter(read_batches([file], ("synth_id", "messages_json"), row, row + 1)))
            conversation = parse_messages(batch.columns["messages_json"][0])
            validate(conversation)
            try:
                document = expected_document(tokenizer_dir, conversation, config["seq_len"])
            except OracleTooSlowError:
                found["passed_over"] += 1
                continue
            synth_id = batch.columns["synth_id"][0] or ""
            split = split_of(synth_id, config["valid_fraction"])
            where = f"{entry['path']} row {row} ({synth_id})"
            if document is None:
                found["dropped"] += 1
                continue
            found[split] += 1
            shard = built.get((split, f"shard_{number}"))
            if shard is None or not _holds(_open_shard(payload_dir, shard), document):
                faults.append(f"{where}: {split}/shard_{number} does not hold what openai-harmony renders")
    passed_over = found["passed_over"]
    if passed_over and passed_over == found.total():
        faults.append(f"nothing was compared: all {passed_over} sampled conversations have {TOO_SLOW}")
    said = f"{found.total() - passed_over} conversations rendered again, all equal"
    if passed_over:
        said += f"; {passed_over} passed over, which have {TOO_SLOW}"
    return Verdict.of(faults, said, {name: count for name, count in found.items() if count})


def split_rule_holds(
    manifest: dict[str, Any], harmony_dir: Path, harmony_manifest: dict[str, Any]
) -> Verdict:
    """Check that each split got or dropped as many conversations as the hashes of the ids say."""
    config = manifest["config"]
    left = config["max_rows"] if config["max_rows"] >= 0 else harmony_manifest["storage"]["total_rows"]
    expected: Counter[str] = Counter()
    for entry in harmony_manifest["storage"]["shards"]:
        file = inspect_file(harmony_dir / entry["path"], ("synth_id",), entry["sha256"])
        for batch in read_batches([file], ("synth_id",), 0, min(left, file.rows)):
            expected.update(
                split_of(synth_id or "", config["valid_fraction"]) for synth_id in batch.columns["synth_id"]
            )
        left -= min(left, file.rows)
    faults = []
    metadata: dict[str, Any] = {"valid_fraction": config["valid_fraction"]}
    for name, split in manifest["splits"].items():
        dropped = sum(value for reason, value in split["counts"].items() if reason.startswith("drop_"))
        metadata[name] = {"expected": expected[name], "kept": split["rows"], "dropped": dropped}
        if split["rows"] + dropped != expected[name]:
            faults.append(f"{name}: {split['rows']} kept and {dropped} dropped, the ids say {expected[name]}")
    return Verdict.of(faults, f"{expected.total()} ids stand where their hash says", metadata)


@dataclass(frozen=True)
class _Trio:
    index: Index
    tokens: npt.NDArray[Any]
    mask: npt.NDArray[Any]
    span: npt.NDArray[Any]


def _shards(manifest: dict[str, Any]) -> Sequence[tuple[str, str, dict[str, Any]]]:
    return [
        (split, shard["name"], shard)
        for split, content in manifest["splits"].items()
        for shard in content["shards"]
    ]


def _open_shard(payload_dir: Path, shard: dict[str, Any]) -> _Trio:
    arrays, first = [], None
    for kind, dtype in (("tokens", "<i4"), ("lossmask", "u1"), ("span", "u1")):
        path = payload_dir / shard["paths"][f"{kind}.idx"]
        index = read_index(path)
        if index.dtype != np.dtype(dtype):
            raise DataError(f"{path} holds {index.dtype}, expected {np.dtype(dtype)}")
        if first is None:
            first = index
        elif not np.array_equal(index.lengths, first.lengths):
            raise DataError(f"{path} has other document lengths than the tokens; build the shard again")
        arrays.append(map_elements(path.with_suffix(""), index))
    assert first is not None
    return _Trio(first, *arrays)


#: Elements looked at together, so that memory does not grow with the shard.
_WINDOW = 1 << 22


def _alignment_faults(trio: _Trio, shard: dict[str, Any]) -> list[str]:
    lengths = trio.index.lengths
    if (lengths.size, trio.index.elements) != (shard["rows"], shard["tokens"]):
        return [f"{lengths.size} documents of {trio.index.elements} tokens, the manifest says otherwise"]
    last = np.cumsum(lengths, dtype=np.int64) - 1
    if not (lengths > 0).all() or not (trio.tokens[last] == tokenizer.EOD).all():
        return ["a document is empty or does not end with the EOD"]
    eods = 0
    for start in range(0, trio.tokens.size, _WINDOW):
        window = slice(start, start + _WINDOW)
        tokens, mask, span = trio.tokens[window], trio.mask[window], trio.span[window]
        if int(tokens.min()) < 0 or int(tokens.max()) >= tokenizer.VOCAB_SIZE:
            return ["a token id lies outside the vocabulary"]
        if int(span.max()) > 2 or not np.array_equal(mask, (span > 0).astype(np.uint8)):
            return ["the loss mask is not 1 exactly where the span is 1 or 2"]
        eods += int(np.count_nonzero(tokens == tokenizer.EOD))
    if eods != lengths.size:
        return [f"{eods} EOD tokens in {lengths.size} documents"]
    if trio.mask[last].any():
        return ["an EOD position has a label"]
    return []


def _holds(trio: _Trio, document: tuple[list[int], list[int], list[int]]) -> bool:
    tokens, mask, span = (np.array(values) for values in document)
    offsets = trio.index.offsets // trio.index.dtype.itemsize
    for number in np.flatnonzero(trio.index.lengths == tokens.size):
        part = slice(int(offsets[number]), int(offsets[number]) + tokens.size)
        if np.array_equal(trio.tokens[part], tokens):
            return np.array_equal(trio.mask[part], mask) and np.array_equal(trio.span[part], span)
    return False
