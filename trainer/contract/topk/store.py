"""Reading a store: random access by sequence, from maps of its files."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.contract.json_text import parse_json
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.manifest import MANIFEST_NAME, SCHEMA, identity_of, shard_entries
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.sequences import Sequences
from trainer.contract.topk.shard_file import shard_name
from trainer.contract.topk.shard_reader import Maps, TopKShard

_CACHED = 4


class TopKStore:
    """A store on disk, opened for reading.

    Attributes:
        root: Its directory.
        manifest: Content of `store.json`.
        identity: What it speaks of.
    """

    def __init__(self, root: Path, expect: Mapping[str, Any] | None = None):
        """Open a store and check that its files are all there, each of its size.

        Args:
            root: Directory with `store.json`, `train/` and `valid/`.
            expect: What the manifest must say; see `require`.

        Raises:
            StoreError: If the manifest is missing, of another schema or damaged, a shard is missing or has
                another size, or the store is not the expected one.
        """
        self.root = root
        path = root / MANIFEST_NAME
        try:
            self.manifest: dict[str, Any] = parse_json(path.read_bytes())
            schema = self.manifest["schema"]
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing: {root} is no finished top-K store; score it") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}); score the store again") from error
        if schema != SCHEMA:
            raise StoreError(f"{path} is of schema {schema!r}, expected {SCHEMA!r}; score the store again")
        self.identity = identity_of(self.manifest, str(path))
        if self.manifest.get("binding") != self.identity.digest:
            raise StoreError(
                f"{path} was changed: its binding is not the digest of what it says; score again"
            )
        self.require(**(expect or {}))
        self._shards: dict[tuple[str, int], TopKShard] = {}
        maps = Maps()
        for split, number, entry in shard_entries(self.manifest, str(path)):
            file = root / split / shard_name(number)
            self._shards[split, number] = TopKShard(
                file, self.identity, split=split, shard=number, entry=entry, maps=maps
            )
        self._cache: OrderedDict[tuple[str, int, int], tuple[Sequences, TopKRecords]] = OrderedDict()

    def require(self, **expected: Any) -> None:
        """Refuse a store that is not what is asked for.

        Args:
            expected: Values of the manifest by key: `teacher`, `tokenizer_sha256`, `dataset_digest`, `topk`,
                … Of `teacher` only the keys that are given count.

        Raises:
            StoreError: Naming the keys that differ.
        """
        for key, value in expected.items():
            found = self.manifest.get(key)
            if isinstance(value, Mapping) and isinstance(found, Mapping):
                found = {name: found.get(name) for name in value}
                value = dict(value)
            if found != value:
                raise StoreError(
                    f"{self.root} is a store of another kind: {key} is {found!r}, expected {value!r}; score"
                    " the data set with this teacher and these terms, or name the store that has them"
                )

    def shards(self, split: str) -> list[int]:
        """Numbers of the shards of a split, ascending."""
        return sorted(number for name, number in self._shards if name == split)

    def sequences(self, split: str, shard: int) -> NDArray[np.int64]:
        """Numbers of the sequences that have records, ascending.

        Raises:
            StoreError: If there is no such shard, or it is damaged.
        """
        return self._shard(split, shard).sequences

    def read(self, split: str, shard: int, sequence: int) -> TopKRecords:
        """Return the records of a sequence.

        Args:
            split: `"train"` or `"valid"`.
            shard: Number of the data set's shard.
            sequence: Its number in that shard.

        Raises:
            StoreError: If the store has no records of it, or their block is damaged.
        """
        file = self._shard(split, shard)
        block = file.block_of(sequence)
        key = (split, shard, block)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            self._cache[key] = file.read_block(block)
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        sequences, records = self._cache[key]
        return records[file.rows(sequences, sequence, block)]

    def verify(self) -> None:
        """Read everything: every block, and the sha256 of every shard.

        Raises:
            StoreError: Naming the first block or file that is not what was written.
        """
        for _, shard in sorted(self._shards.items()):
            for number in range(shard.blocks):
                shard.verify_block(number)
            shard.verify()

    def _shard(self, split: str, shard: int) -> TopKShard:
        try:
            return self._shards[split, shard]
        except KeyError:
            raise StoreError(
                f"{self.root} has no shard {shard} of {split!r}, only {self.shards(split)}; score the whole"
                " data set"
            ) from None
