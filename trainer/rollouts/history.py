"""The rounds that a run was trained on, one file each, in `rollouts/` of its work directory.

A round is written at the step that it is for, after its scores. A run that goes on from a checkpoint of step
k removes what was written for later steps and makes it again, so that the files tell the one run that led to
the present state: every prompt of the walk in its place, none twice and none lost.
"""

import hashlib
from pathlib import Path

from trainer.contract.files import replace_bytes, sync
from trainer.errors import DataError
from trainer.rollouts.storage import round_name


class History:
    """Writes rounds, or only reckons what they would be.

    Args:
        directory: Where they go; None writes nothing, on ranks that do not lead and where a run is repeated
            to be compared.

    Attributes:
        sha256: Digest over the digests of all rounds so far, in order; the identity of what happened.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.sha256 = hashlib.sha256(b"").hexdigest()

    def add(self, number: int, content: bytes) -> None:
        """Take a round in."""
        link = self.sha256 + hashlib.sha256(content).hexdigest()
        self.sha256 = hashlib.sha256(link.encode("ascii")).hexdigest()
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_bytes(self._directory / round_name(number), content)

    def go_on(self, number: int, sha256: str | None = None) -> None:
        """Continue behind a round, which is the last one that is kept.

        Args:
            number: 0 removes all of them.
            sha256: The identity until then.

        Raises:
            DataError: A round until then is missing.
        """
        self.sha256 = hashlib.sha256(b"").hexdigest() if sha256 is None else sha256
        if self._directory is None:
            return
        found = set()
        if self._directory.is_dir():
            kept = {round_name(kept): kept for kept in range(1, number + 1)}
            for path in sorted(self._directory.iterdir(), reverse=True):
                if path.name in kept:
                    found.add(kept[path.name])
                else:
                    path.unlink()
            sync(self._directory)
        if missing := [kept for kept in range(1, number + 1) if kept not in found]:
            raise DataError(
                f"{self._directory / round_name(missing[0])} is missing ({len(missing)} of the {number} "
                "rounds that the checkpoint follows): put it back, or begin again with "
                "execution.resume = false"
            )
