"""Checks of a store of a teacher's log-probs against the data set that it was made for, as pure functions.

They trust neither the scorer nor its manifest: which conversations are scored is worked out from their
tokens, how many records each has from its mask, and what a record may say of its label from the next token.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.subset import scored_sequence
from vpmoe_assets.harmony.indexed import map_elements, read_index
from vpmoe_assets.harmony.tokenizer import VOCAB_SIZE
from vpmoe_assets.verdict import Verdict

_MASS_ERROR = 1e-4
"""What sums of K single-precision probabilities may be off by."""


class Shard:
    """The documents of one shard of `synth_kd_v1`, memory-mapped.

    Args:
        payload_dir: Of the data set.
        split: `train` or `valid`.
        entry: Of the shard in the data set's manifest.
    """

    def __init__(self, payload_dir: Path, split: str, entry: dict[str, Any]) -> None:
        self.split, self.name = split, str(entry["name"])
        self.number = int(self.name.rpartition("_")[2])
        prefixes = {kind: payload_dir / entry["paths"][f"{kind}.idx"] for kind in ("tokens", "lossmask")}
        index = read_index(prefixes["tokens"])
        self.lengths = index.lengths
        self._starts = index.offsets // index.dtype.itemsize
        self._tokens = map_elements(prefixes["tokens"].with_suffix(""), index)
        self._mask = map_elements(prefixes["lossmask"].with_suffix(""), read_index(prefixes["lossmask"]))

    def tokens(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of a document, int32 [length]."""
        return np.asarray(self._tokens[self._part(sequence)])

    def labels(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids that the supervised positions of a document are to predict, int32 [n], in order."""
        part = self._part(sequence)
        positions = np.flatnonzero(np.asarray(self._mask[part]))
        return np.asarray(self._tokens[part])[positions + 1]

    def _part(self, sequence: int) -> slice:
        start = int(self._starts[sequence])
        return slice(start, start + int(self.lengths[sequence]))


def shards_of(payload_dir: Path, manifest: dict[str, Any]) -> Iterator[Shard]:
    """Open the shards of a data set, one after another."""
    for split, content in manifest["splits"].items():
        for entry in content["shards"]:
            yield Shard(payload_dir, split, entry)


def shards_verify(store_dir: Path) -> Verdict:
    """Check every block's checksum and every shard's sha256."""
    try:
        store = TopKStore(store_dir)
        store.verify()
    except StoreError as error:
        return Verdict(False, str(error), {})
    size, shards = stored_bytes(store.manifest), stored_shards(store.manifest)
    return Verdict(True, f"{len(shards)} shards, {size} bytes, every block as written", {"bytes": size})


def bound_to(store_dir: Path, **expected: Any) -> Verdict:
    """Check that a store was made from what it should have been.

    Args:
        store_dir: The payload.
        expected: Values of the manifest by key; of `teacher` only the keys that are given count.
    """
    try:
        store = TopKStore(store_dir, expected)
    except StoreError as error:
        return Verdict(False, str(error), {})
    teacher = ", ".join(f"{key} {value}" for key, value in sorted(store.manifest["teacher"].items()))
    return Verdict(True, f"of this data set and tokenizer, by the teacher: {teacher}", {})


def subset_rule_holds(
    store_dir: Path, kd_dir: Path, kd_manifest: dict[str, Any], *, fraction: float
) -> Verdict:
    """Check that exactly those conversations are scored of which the hash of the tokens says so."""
    faults: list[str] = []
    counts: Counter[str] = Counter()
    try:
        store = TopKStore(store_dir)
        for shard in shards_of(kd_dir, kd_manifest):
            expected = np.array(
                [
                    number
                    for number in range(shard.lengths.size)
                    if shard.split == "valid" or scored_sequence(shard.tokens(number), fraction)
                ],
                dtype=np.int64,
            )
            found = store.sequences(shard.split, shard.number)
            counts[shard.split] += expected.size
            where = f"{shard.split}/{shard.name}"
            faults += [
                f"{where}: sequence {number} is to be scored and is not in the store"
                for number in np.setdiff1d(expected, found).tolist()
            ]
            faults += [
                f"{where}: sequence {number} is in the store and is not of the subset"
                for number in np.setdiff1d(found, expected).tolist()
            ]
    except StoreError as error:
        faults.append(str(error))
    good = f"{counts['train']} conversations of train and all {counts['valid']} of valid are scored"
    return Verdict.of(faults, good, {"subset_fraction": fraction, **counts})


def one_record_per_token(store_dir: Path, kd_dir: Path, kd_manifest: dict[str, Any]) -> Verdict:
    """Check that each scored conversation has a record for each supervised token, and that token's own.

    A label that is among the kept ids must have the probability that it has there; one that is not must not
    be more probable than the last of them. Records that are shifted by one position would fail it.
    """
    faults: list[str] = []
    tokens = kept = 0
    for shard, number, records in _records(store_dir, kd_dir, kd_manifest, faults):
        labels = shard.labels(number)
        where = f"{shard.split}/{shard.name} sequence {number}"
        if records.label_logprob.size != labels.size:
            faults.append(f"{where}: {records.label_logprob.size} records, its mask has {labels.size} tokens")
            continue
        tokens += labels.size
        among = records.ids == labels[:, None]
        kept += int(among.any(axis=1).sum())
        if (off := _label_faults(records, among, _allowed(store_dir))) is not None:
            faults.append(f"{where}: supervised token {off}: the label's log-prob is not that of its id")
    share = kept / tokens if tokens else 0.0
    metadata = {"tokens": tokens, "labels_among_kept_ids": share}
    return Verdict.of(faults, f"{tokens} supervised tokens, a record each", metadata)


def mass_at_most_one(store_dir: Path, kd_dir: Path, kd_manifest: dict[str, Any]) -> Verdict:
    """Check that kept ids and tail are a distribution: mass 1 at most, ids distinct and of the vocabulary."""
    faults: list[str] = []
    most = 0.0
    for shard, number, records in _records(store_dir, kd_dir, kd_manifest, faults):
        where = f"{shard.split}/{shard.name} sequence {number}"
        mass = masses(records)
        if mass.size:
            most = max(most, float((mass + records.tail_mass).max()))
        faults += [f"{where}: {fault}" for fault in _distribution_faults(records, mass)]
    return Verdict.of(faults, f"kept ids and tail have a mass of {most:.6f} at most", {"largest": most})


def masses(records: TopKRecords) -> npt.NDArray[np.float64]:
    """Return the probability mass of the kept ids of each record, float64 [n]."""
    return np.asarray(np.exp(records.logprobs.astype(np.float64)).sum(axis=1))


def stored_shards(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all shards of a store."""
    return [entry for split in manifest["splits"].values() for entry in split["shards"]]


def stored_bytes(manifest: Mapping[str, Any]) -> int:
    """Return the bytes of all shards of a store."""
    return sum(int(entry["bytes"]) for entry in stored_shards(manifest))


def kept_mass(store_dir: Path, most: int, bins: int = 10) -> dict[str, float]:
    """Return how the mass of the kept ids is distributed over tokens: their share in each bin of [0, 1].

    Args:
        store_dir: The payload.
        most: Tokens that are looked at, the first ones.
        bins: Of equal width.
    """
    store = TopKStore(store_dir)
    counts, tokens = np.zeros(bins, np.int64), 0
    for split, content in store.manifest["splits"].items():
        for entry in content["shards"]:
            for number in store.sequences(split, entry["shard"]).tolist():
                if tokens >= most:
                    break
                mass = masses(store.read(split, entry["shard"], number))
                tokens += mass.size
                counts += np.histogram(np.clip(mass, 0, 1), bins=bins, range=(0, 1))[0]
    edges = [f"{place / bins:.1f}–{(place + 1) / bins:.1f}" for place in range(bins)]
    return {edge: count / max(tokens, 1) for edge, count in zip(edges, counts.tolist(), strict=True)}


def _records(
    store_dir: Path, kd_dir: Path, kd_manifest: dict[str, Any], faults: list[str]
) -> Iterator[tuple[Shard, int, TopKRecords]]:
    """Yield what is stored of each scored conversation; a fault of the store ends it and joins the faults."""
    try:
        store = TopKStore(store_dir)
        for shard in shards_of(kd_dir, kd_manifest):
            for number in store.sequences(shard.split, shard.number).tolist():
                yield shard, number, store.read(shard.split, shard.number, number)
    except StoreError as error:
        faults.append(str(error))


def _allowed(store_dir: Path) -> float:
    """How far two stored log-probs of one id may lie apart."""
    return 2 * float(TopKStore(store_dir).manifest["logprob_error"]) + 1e-3


def _label_faults(records: TopKRecords, among: npt.NDArray[np.bool_], allowed: float) -> int | None:
    """Return the first record whose label has another log-prob than its id, or None."""
    label = records.label_logprob.astype(np.float64)
    logprobs = records.logprobs.astype(np.float64)
    kept = among.any(axis=1)
    own = np.where(among, logprobs, -np.inf).max(axis=1, initial=-np.inf)
    least = np.where(records.ids >= 0, logprobs, np.inf).min(axis=1, initial=np.inf)
    with np.errstate(invalid="ignore"):
        wrong = np.where(kept, np.abs(own - label) > allowed, label > least + allowed) | ~(label <= allowed)
    return int(np.flatnonzero(wrong)[0]) if wrong.any() else None


def _distribution_faults(records: TopKRecords, mass: npt.NDArray[np.float64]) -> Iterator[str]:
    ids = np.sort(records.ids, axis=1)
    twice = ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any(axis=1)
    drawn = records.draws
    rules = {
        "kept ids and tail have a mass above 1": ~(mass + records.tail_mass <= 1 + _MASS_ERROR),
        "a tail of negative mass": ~(records.tail_mass >= 0),
        "an id twice": twice,
        "an id outside the vocabulary": (records.ids >= VOCAB_SIZE).any(axis=1)
        | (drawn >= VOCAB_SIZE).any(axis=1),
        "a draw from the tail that is among the kept ids": (
            (drawn[:, :, None] == records.ids[:, None, :]) & (drawn[:, :, None] >= 0)
        ).any(axis=(1, 2)),
    }
    for what, wrong in rules.items():
        if wrong.any():
            yield f"supervised token {int(np.flatnonzero(wrong)[0])}: {what}"
