"""The stored pack index: which documents make up which sample of an epoch.

One `.npy` of int64 pairs `(sample, document)` in sample order, with its sha256 beside it. The index
depends on nothing but the document lengths and four numbers, and its directory is named by exactly those; so
a cache may be deleted, shared between runs or found half-written, and the answer stays the same.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from trainer.contract.files import sync
from trainer.data.packing import ALGORITHM, pack

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # rows written or hashed at a time: 16 MiB


@dataclass(frozen=True)
class PackKey:
    """Everything a pack index depends on.

    Attributes:
        lengths_sha256: Digest of the document lengths, int32 little endian.
        seq_len: Tokens per sample.
        block: Documents packed together.
        seed: Experiment seed.
        epoch: Epoch number from 0.
    """

    lengths_sha256: str
    seq_len: int
    block: int
    seed: int
    epoch: int

    def payload(self) -> dict[str, int | str]:
        """Return the key as JSON, with the algorithm that reads it."""
        return {"algorithm": ALGORITHM, **vars(self)}

    def digest(self) -> str:
        """Return the name of this key's directory in a cache."""
        text = json.dumps(self.payload(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()


class PackIndex:
    """A pack index, memory-mapped.

    Attributes:
        sha256: Digest of the pairs (int64 little endian, row by row; the `.npy` header is left out so that
            the value survives a change of NumPy's format).
        num_samples: Samples of the epoch.
        fill_ratio: Document tokens over `num_samples * seq_len`.
    """

    def __init__(self, pairs: NDArray[np.int64], *, sha256: str, fill_ratio: float):
        self._pairs = pairs
        self.sha256 = sha256
        self.num_samples = int(pairs[-1, 0]) + 1
        self.fill_ratio = fill_ratio

    def documents(self, sample: int) -> NDArray[np.int64]:
        """Document numbers of one sample, in their order in the row [k].

        Raises:
            IndexError: If `sample` is not in `[0, num_samples)`.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample}: this epoch has samples 0 to {self.num_samples - 1}")
        # A bisection over the map reads some thirty rows; numpy's would copy the whole column into memory
        # first.
        rows = range(len(self._pairs))
        first = bisect_left(rows, sample, key=lambda row: self._pairs[row, 0])
        last = first
        while last < len(self._pairs) and self._pairs[last, 0] == sample:
            last += 1
        return np.array(self._pairs[first:last, 1])


def load_or_build(
    cache_dir: Path,
    key: PackKey,
    lengths: NDArray[np.integer],
    describe: Callable[[int], str] = "document {}".format,
) -> PackIndex:
    """Open the pack index of `key`, packing the epoch first where the cache does not hold it intact.

    Several ranks of one host may call this at once: one packs, the others wait for its result. A damaged
    entry is reported and made again, which is safe because the content is a pure function of the key.

    Args:
        cache_dir: Directory of the cache; made if absent.
        key: What to pack.
        lengths: Document lengths [n] that `key.lengths_sha256` is the digest of.
        describe: Names a document in an error message.

    Raises:
        DataError: If the documents cannot be packed (see `pack`).
    """
    name = f"pack-{key.digest()[:24]}"
    entry = cache_dir / name
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{name}.lock"):
        index = _open(entry, key)
        if index is None:
            shutil.rmtree(entry, ignore_errors=True)
            _build(entry, key, lengths, describe)
            index = _open(entry, key)
    if index is None:
        raise OSError(f"{entry} was just written and does not read back; check the disk under {cache_dir}")
    return index


def _open(entry: Path, key: PackKey) -> PackIndex | None:
    """Open a stored index, or None where there is none or it is not what its metadata says."""
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / "pack_index.json").read_text())
        if meta["key"] != key.payload():
            raise ValueError(f"made for another key: {meta['key']}")
        pairs = np.load(entry / "pack_index.npy", mmap_mode="r", allow_pickle=False)
        if pairs.dtype != np.dtype("<i8") or pairs.shape != (meta["documents"], 2):
            raise ValueError(
                f"array {pairs.dtype}{list(pairs.shape)}, expected int64 [{meta['documents']}, 2]"
            )
        if (found := _sha256(pairs)) != meta["sha256"]:
            raise ValueError(f"sha256 {found}, expected {meta['sha256']}")
        return PackIndex(pairs, sha256=meta["sha256"], fill_ratio=meta["fill_ratio"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("packing again: the cached index %s is damaged (%s)", entry, error)
        return None


def _build(entry: Path, key: PackKey, lengths: NDArray[np.integer], describe: Callable[[int], str]) -> None:
    """Pack and store; the entry appears whole, by one rename, or not at all."""
    documents, sizes = pack(
        lengths, seq_len=key.seq_len, block=key.block, seed=key.seed, epoch=key.epoch, describe=describe
    )
    building = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        array = building / "pack_index.npy"
        pairs = np.lib.format.open_memmap(array, mode="w+", dtype="<i8", shape=(len(documents), 2))
        pairs[:, 0] = np.repeat(np.arange(len(sizes)), sizes)
        pairs[:, 1] = documents
        pairs.flush()
        meta = {
            "schema": "vpmoe.pack_index/1",
            "key": key.payload(),
            "sha256": _sha256(pairs),
            "documents": len(documents),
            "samples": len(sizes),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "fill_ratio": int(lengths.sum(dtype=np.int64)) / (len(sizes) * key.seq_len),
        }
        del pairs
        (building / "pack_index.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
        for path in (array, building / "pack_index.json", building):
            sync(path)
        building.rename(entry)
        sync(entry.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _sha256(pairs: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(pairs), _CHUNK):
        digest.update(np.ascontiguousarray(pairs[start : start + _CHUNK]))
    return digest.hexdigest()
