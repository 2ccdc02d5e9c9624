"""Digests of published files, remembered while the file system vouches that they are unchanged."""

from collections.abc import Sequence
from pathlib import Path

from vpmoe_assets.lineage.digest import hash_files
from vpmoe_assets.lineage.filememory import FileMemory, Identity, identity, settled


class HashCache:
    """Callable like `hash_files`; reads only the files about which something has changed.

    Decay of the medium is not noticed: `vpmoe verify --deep` always reads.

    Args:
        path: Of its database.
    """

    def __init__(self, path: Path) -> None:
        self._memory = FileMemory(path)

    def __call__(self, files: Sequence[Path]) -> list[str]:
        """Return the sha256 of each file, in hex."""
        known = {file: identity(file.stat()) for file in files}
        digests = self._memory.recall(known)
        unknown = [file for file in known if file not in digests]
        quiet = {file for file in unknown if settled(known[file])}
        digests |= dict(zip(unknown, hash_files(unknown), strict=True))
        self._memory.keep(
            (file, known[file], digests[file]) for file in quiet if identity(file.stat()) == known[file]
        )
        return [digests[file] for file in files]

    def learn(self, made: Sequence[tuple[Path, Identity, str]]) -> None:
        """Remember the digests of files that this process has just published.

        Args:
            made: Where each is now, what it was known by when it was sealed, and its sha256.
        """
        self._memory.keep(
            (file, known, digest)
            for file, known, digest in made
            if settled(known, sealed=True) and identity(file.stat()) == known
        )

    def close(self) -> None:
        """Close the database; it is opened again when it is needed."""
        self._memory.close()
