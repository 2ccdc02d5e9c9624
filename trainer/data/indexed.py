"""Tokenised documents on disk: Megatron's `.bin`/`.idx` pairs, checked before they are trusted.

`megatron.core.datasets.IndexedDataset` does the reading. What it does not do is refuse: a truncated
`.bin`, a sidecar of another build, or a length array that disagrees would be read as other tokens. Every
file is therefore checked against its own header, its siblings and the manifest when it is opened (arrays
only, no token is read but a small sample), and every document again when it is taken.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from trainer.contract.indexed import DTYPES, HEADER_BYTES, unpack_header
from trainer.contract.json_text import parse_json
from trainer.errors import DataError

_DTYPE_CODES = {code: np.dtype(name) for code, name in DTYPES.items()}
_PROBES = 256  # documents per shard whose last token is read on opening

SIDECARS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),
    "lossmask": np.dtype(np.uint8),
    "span": np.dtype(np.uint8),
}
SPAN_REASONING = 1
SPAN_FINAL = 2
SPAN_TEXT = 3
SPAN_SCORED_REASONING = 4
SPAN_SCORED_FINAL = 5
"""Spans that are never stored: they keep healing text, and conversations that a teacher has scored, apart
from the two spans of a conversation, which have weights of their own in the loss."""


def read_manifest(root: Path, schema_version: str) -> dict[str, Any]:
    """Read the manifest of a data set, in its directory or, for a stored artifact, beside its payload.

    Args:
        root: Directory that holds the splits.
        schema_version: The schema the caller can read.

    Raises:
        DataError: If there is no manifest, it is not JSON, or it is of another schema.
    """
    candidates = [root / "manifest.json", root.parent / "manifest.json"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise DataError(
            f"no manifest for {root}: looked for {candidates[0]} and {candidates[1]}. Without it nobody knows"
            " what the tokens are; build the data set again"
        )
    try:
        manifest = parse_json(path.read_text())
        found = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a data manifest ({type(error).__name__}: {error})") from error
    if found != schema_version:
        raise DataError(f"{path} has schema_version {found!r}; this reader takes {schema_version!r}")
    return dict(manifest)


def manifest_value(manifest: dict[str, Any], *keys: str) -> Any:
    """Look up a nested field of a manifest.

    Raises:
        DataError: If it is not there; the message has the whole key path.
    """
    value: Any = manifest
    for depth, key in enumerate(keys, start=1):
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"the data manifest has no {'.'.join(keys[:depth])}; build the data set again")
        value = value[key]
    return value


def open_indexed(prefix: Path, dtype: np.dtype[Any]) -> IndexedDataset:
    """Open one `.bin`/`.idx` pair after checking that the two files fit each other.

    Args:
        prefix: Path without the `.bin` or `.idx`.
        dtype: Element type that the caller expects.

    Returns:
        The data set; one sequence is one document.

    Raises:
        DataError: If a file is missing, truncated, of another type, or inconsistent; the message names it.
    """
    idx, bin_ = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise DataError(f"{path} is missing")
    with idx.open("rb") as file:
        content = file.read(HEADER_BYTES)
    if len(content) < HEADER_BYTES:
        raise DataError(f"{idx} is truncated: {len(content)} bytes, its header alone takes {HEADER_BYTES}")
    header = unpack_header(content)
    code, sequences, indices = header.code, header.sequences, header.documents
    if not header.known:
        raise DataError(
            f"{idx} is not a Megatron index of version 1 (magic {header.magic!r}, version {header.version})"
        )
    if _DTYPE_CODES.get(code) != dtype:
        raise DataError(f"{idx} has element type {_DTYPE_CODES.get(code, f'code {code}')}; expected {dtype}")
    if sequences == 0:
        raise DataError(f"{idx} holds no documents; an empty split leaves no files")
    if (size := idx.stat().st_size) != (expected := header.file_bytes):
        raise DataError(
            f"{idx} is damaged: {size} bytes, {sequences} sequences and {indices} indices take {expected}"
        )

    body = np.memmap(idx, mode="r", dtype=np.uint8, offset=HEADER_BYTES)
    lengths = body[: 4 * sequences].view("<i4")
    offsets = body[4 * sequences : 12 * sequences].view("<i8")
    documents = body[12 * sequences :].view("<i8")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if (lengths < 1).any():
        raise DataError(f"{idx}: document {int(np.argmax(lengths < 1))} has length {int(lengths.min())}")
    if not np.array_equal(offsets, ends - lengths.astype(np.int64) * dtype.itemsize):
        raise DataError(f"{idx}: byte offsets do not follow from the lengths")
    if not np.array_equal(documents, np.arange(sequences + 1)):
        raise DataError(f"{idx}: document indices are not 0..{sequences}; one sequence must be one document")
    if (size := bin_.stat().st_size) != ends[-1]:
        raise DataError(
            f"{bin_} is {'truncated' if size < ends[-1] else 'too long'}: {size} bytes, expected {ends[-1]}"
        )
    return IndexedDataset(str(prefix))


def check_last_tokens(dataset: IndexedDataset, eod: int, path: Path) -> None:
    """Read the last token of some evenly spread documents, a cheap check that EOD is the one expected.

    Raises:
        DataError: If one of them is not `eod`.
    """
    n = len(dataset)
    for document in np.unique(np.linspace(0, n - 1, num=min(n, _PROBES)).astype(np.int64)).tolist():
        last = int(dataset.get(document, offset=int(dataset.sequence_lengths[document]) - 1)[0])
        if last != eod:
            raise DataError(f"{path}: document {document} ends with token {last}, not with EOD {eod}")


def check_single_eod(tokens: NDArray[np.int32], eod: int, name: str) -> None:
    """Check that EOD stands once in a document, at its end.

    Raises:
        DataError: If it does not.
    """
    found = np.flatnonzero(tokens == eod)
    if len(found) != 1 or found[0] != len(tokens) - 1:
        raise DataError(
            f"{name}: EOD {eod} at positions {found[:5].tolist()} of {len(tokens)} tokens; expected once,"
            " last"
        )


class SpanDocument(NamedTuple):
    """One conversation: `tokens` int32, `loss_mask` uint8 and `span` uint8, all [n] and label-aligned.

    Label-aligned: `loss_mask[t]` and `span[t]` belong to the prediction of `tokens[t + 1]` made at
    `t`.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    span: NDArray[np.uint8]


class SpanDocuments:
    """One split of a span-labelled data set: all its shards, as one list of conversations.

    Attributes:
        manifest: The data set's manifest.
        eod: End-of-document token id, from the manifest.
        lengths: Tokens of each document, shards in the order of their names [n] int32.
    """

    SCHEMA = "synth_kd_v1"

    def __init__(self, root: Path, split: str):
        """Open and check a split.

        Args:
            root: Directory with `train/` and `valid/`, the manifest inside it or beside it.
            split: `"train"` or `"valid"`.

        Raises:
            DataError: If the manifest is missing or disagrees, the split is empty, or a file is damaged or
                does not fit its siblings. The message names the file.
        """
        self.manifest = read_manifest(root, self.SCHEMA)
        alignment = manifest_value(self.manifest, "config", "loss_mask_alignment")
        if alignment != "labels_shifted_with_pad":
            raise DataError(
                f"{root}: manifest says loss_mask_alignment = {alignment!r}; only"
                " 'labels_shifted_with_pad' is read"
            )
        self.eod = int(manifest_value(self.manifest, "config", "eod_token_id"))
        self._directory = root / split
        names = self._shard_names(split)
        self._names = [str(self._directory / name) for name in names]
        self._shards = [self._open_shard(name) for name in names]
        self.lengths: NDArray[np.int32] = np.concatenate(
            [np.asarray(shard["tokens"].sequence_lengths, dtype=np.int32) for shard in self._shards]
        )
        self._starts = np.cumsum([0, *(len(shard["tokens"]) for shard in self._shards)])
        self._check_counts(split)

    def _shard_names(self, split: str) -> list[str]:
        """Names of the shards on disk, which must be those of the manifest."""
        on_disk = sorted(
            {
                path.name.rsplit("_", 1)[0]
                for path in self._directory.glob("shard_*_*.*")
                if path.suffix in (".bin", ".idx")
            }
        )
        if not on_disk:
            raise DataError(
                f"{self._directory} has no shards: the {split!r} split is empty. Build more rows or another"
                " valid_fraction"
            )
        listed = sorted(shard["name"] for shard in manifest_value(self.manifest, "splits", split, "shards"))
        if on_disk != listed:
            raise DataError(f"{self._directory} has shards {on_disk}, its manifest lists {listed}")
        return on_disk

    def _open_shard(self, name: str) -> dict[str, Any]:
        prefixes = {kind: self._directory / f"{name}_{kind}" for kind in SIDECARS}
        shard = {kind: open_indexed(prefixes[kind], dtype) for kind, dtype in SIDECARS.items()}
        tokens = shard["tokens"]
        for kind in ("lossmask", "span"):
            if len(shard[kind]) != len(tokens):
                raise DataError(
                    f"{prefixes[kind]}.idx has {len(shard[kind])} documents, {prefixes['tokens']}.idx has"
                    f" {len(tokens)}"
                )
            differ = np.flatnonzero(shard[kind].sequence_lengths != tokens.sequence_lengths)
            if len(differ):
                at = int(differ[0])
                raise DataError(
                    f"{prefixes[kind]}.idx: document {at} has length {shard[kind].sequence_lengths[at]}, in"
                    f" {prefixes['tokens']}.idx {tokens.sequence_lengths[at]} ({len(differ)} documents"
                    " differ)"
                )
        check_last_tokens(tokens, self.eod, prefixes["tokens"].with_suffix(".bin"))
        return shard

    def _check_counts(self, split: str) -> None:
        listed = {shard["name"]: shard for shard in manifest_value(self.manifest, "splits", split, "shards")}
        for name, shard in zip(self._names, self._shards, strict=True):
            entry = listed[Path(name).name]
            found = (len(shard["tokens"]), int(shard["tokens"].sequence_lengths.sum(dtype=np.int64)))
            if found != (entry["rows"], entry["tokens"]):
                raise DataError(
                    f"{name}: {found[0]} rows and {found[1]} tokens on disk, {entry['rows']} rows and"
                    f" {entry['tokens']} tokens in the manifest"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> SpanDocument:
        """Read one conversation into memory and check it.

        Raises:
            IndexError: If there is no such document.
            DataError: If EOD is not exactly the last token, the mask is not 0/1, mask and span disagree, a
                span is unknown, or the prediction after EOD is supervised.
        """
        shard, local = self._locate(document)
        # Copies: the arrays of IndexedDataset point into a map that it closes when it goes.
        read = {kind: np.array(dataset.get(local)) for kind, dataset in self._shards[shard].items()}
        tokens, mask, span = read["tokens"], read["lossmask"], read["span"]
        check_single_eod(tokens, self.eod, self.describe(document))
        if mask.max() > 1 or span.max() > SPAN_FINAL or not np.array_equal(mask > 0, span > 0):
            at = int(np.argmax((mask > 1) | (span > SPAN_FINAL) | ((mask > 0) != (span > 0))))
            raise DataError(
                f"{self.describe(document)}: loss mask {mask[at]} with span {span[at]} at position {at};"
                " allowed are 0 with 0, and 1 with 1 (reasoning) or 2 (final)"
            )
        if mask[-1]:
            raise DataError(f"{self.describe(document)}: the prediction after EOD is supervised")
        return SpanDocument(tokens, mask, span)

    def _locate(self, document: int) -> tuple[int, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document}: {self._directory} has documents 0 to {len(self) - 1}")
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        return shard, int(document - self._starts[shard])

    @property
    def shards(self) -> dict[int, range]:
        """Documents of each shard, by the shard's number."""
        starts = self._starts.tolist()
        return {
            int(Path(name).name.rsplit("_", 1)[1]): range(starts[place], starts[place + 1])
            for place, name in enumerate(self._names)
        }

    def place(self, document: int) -> tuple[int, int]:
        """Return the number of a document's shard, and its own in that shard.

        Raises:
            IndexError: There is no such document.
        """
        shard, local = self._locate(document)
        return int(Path(self._names[shard]).name.rsplit("_", 1)[1]), local

    def describe(self, document: int) -> str:
        """Name a document for a person: its place in its file."""
        shard, local = self._locate(document)
        return f"document {local} of {self._names[shard]}_tokens.bin"

    @cached_property
    def lengths_sha256(self) -> str:
        """Digest of the lengths, int32 little endian: all that packing depends on."""
        return hashlib.sha256(np.ascontiguousarray(self.lengths, dtype="<i4")).hexdigest()
