"""The work area: where an artifact is made, and where making it goes on after a crash.

::

    artifacts/.work/<experiment>/<asset>-<fingerprint8>/    WorkArea.path, the trainer's work_dir
        output/                WorkArea.output, the trainer's output_dir
            payload/           WorkArea.payload: what is hashed and delivered
            manifest.json      WorkArea.manifest: where the format has one
            summary.json       what the trainer reports
        run/                   WorkArea.run: anything else worth keeping
        .scratch/              WorkArea.scratch: never published
        metrics.jsonl  log.txt  job.json  STATUS  checkpoints/  heartbeat     as the trainer writes them

Published are `payload/`, `manifest.json` and `run/`, which takes what stands in `run/`, `output/`
and the work area itself, except `heartbeat` and names that start with a dot. Publishing moves; a journal
of the moves lets a publication that was cut short be taken back, so that the next attempt finds everything
where it was.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainer.contract.files import remove_tree, replace_bytes
from vpmoe_assets.lineage.errors import PublishError, RecordError
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME
from vpmoe_assets.lineage.sealing import unseal

_STAGED, _PREPARED, _JOURNAL = ".staged", ".prepared", ".moves.json"
_FINGERPRINT, _BEGUN_WITH, _SCRATCH = ".fingerprint", ".begun-with", ".scratch"
_UNPUBLISHED = {"output", "run", "heartbeat"}


class WorkArea:
    """One locked work area; get it from `vpmoe_assets.lineage.store.Store.work_area`.

    Attributes:
        experiment: Name.
        asset: Name.
        fingerprint: Of the recipe, 64 hex digits.
        path: The directory.
    """

    def __init__(self, path: Path, experiment: str, asset: str, fingerprint: str) -> None:
        self.path = path
        self.experiment = experiment
        self.asset = asset
        self.fingerprint = fingerprint
        self.open = True

    @property
    def output(self) -> Path:
        """Where the maker writes its deliverable: the trainer's `output_dir`."""
        return self.path / "output"

    @property
    def payload(self) -> Path:
        """What is hashed and delivered."""
        return self.output / "payload"

    @property
    def manifest(self) -> Path:
        """Where the format's manifest belongs, if it has one."""
        return self.output / MANIFEST_NAME

    @property
    def run(self) -> Path:
        """Logs, reports and whatever else is kept beside the payload, outside the content digest."""
        return self.path / "run"

    @property
    def scratch(self) -> Path:
        """Temporary files; survives a crash, is never published."""
        return self.path / _SCRATCH

    @property
    def prepared(self) -> Path:
        """Finished versions on their way to their place, a directory each; see `placing`."""
        return self.path / _PREPARED

    def clear(self) -> None:
        """Remove everything in the work area, to start over."""
        self.remove()
        self.prepare()

    def remove(self) -> None:
        """Remove the work area; a kill half-way leaves no half-removed state to resume from."""
        shutil.rmtree(self._trash, ignore_errors=True)
        if self.path.exists():
            self._trash.mkdir(exist_ok=True)  # with what somebody still reads of an earlier one, on NFS
            self.path.rename(self._trash / secrets.token_hex(4))
            remove_tree(self._trash)

    def is_empty(self) -> bool:
        """Say whether there is nothing in it to go on from."""
        own = {_FINGERPRINT, _BEGUN_WITH}
        return all(set(names) <= own for _, _, names in os.walk(self.path))

    def prepare(self) -> None:
        """Make the directories, and make sure that the work found there is of this fingerprint.

        Raises:
            RecordError: See `require_owner`.
        """
        shutil.rmtree(self._trash, ignore_errors=True)
        for directory in (self.payload, self.run, self.scratch):
            directory.mkdir(parents=True, exist_ok=True)
        if not self.require_owner():
            replace_bytes(self.path / _FINGERPRINT, self.fingerprint.encode(), durable=False)

    def require_owner(self) -> bool:
        """Say whether the work area has an owner; it is this fingerprint.

        Raises:
            RecordError: It is another one, with the same first eight digits.
        """
        owner = self.path / _FINGERPRINT
        if not owner.exists() or not (found := owner.read_text()):  # empty after a power cut
            return False
        if found != self.fingerprint:
            raise RecordError(
                f"{self.path} holds work of fingerprint {found}, not {self.fingerprint}; "
                "remove that directory"
            )
        return True

    def begun_with(self, state: str) -> bool:
        """Make sure that what lies here was begun with the code in a certain state, or start over.

        Args:
            state: Of the code, as `vpmoe_assets.codebase.tree.SourceTree.state` tells it.

        Returns:
            False where the area held work that was begun otherwise, which is removed.
        """
        marker = self.path / _BEGUN_WITH
        same = (marker.read_text() if marker.exists() else "") == state or self.is_empty()
        if not same:
            self.clear()
        replace_bytes(marker, state.encode())
        return same

    def stage(self) -> Path:
        """Move what is to be published into one directory of the published layout and return it."""
        if not any(self.payload.iterdir()):
            raise PublishError(f"nothing to publish: {self.payload} is empty")
        staged = self.path / _STAGED
        moves = [(self.payload, staged / "payload")]
        if self.manifest.exists():
            moves.append((self.manifest, staged / MANIFEST_NAME))
        moves += [(source, staged / "run" / source.name) for source in self._run_entries()]
        targets = [target for _, target in moves]
        if twice := {target.name for target in targets if targets.count(target) > 1}:
            raise PublishError(
                f"{self.path}: {sorted(twice)} would land twice in run/; keep one of each name"
            )
        journal = [[os.path.relpath(end, self.path) for end in move] for move in moves]
        replace_bytes(self.path / _JOURNAL, json.dumps(journal).encode())
        (staged / "run").mkdir(parents=True)
        for source, target in moves:
            source.rename(target)
        return staged

    def unstage(self) -> None:
        """Take back a publication that did not finish: every file returns to where `stage` found it."""
        staged, journal = self.path / _STAGED, self.path / _JOURNAL
        shutil.rmtree(self.prepared, ignore_errors=True)  # first: its files are other names of staged ones
        if staged.exists():
            (staged / RECORD_NAME).unlink(missing_ok=True)
            unseal(staged)
            for source, target in reversed(json.loads(journal.read_bytes())):
                if (self.path / target).exists():
                    self._return(self.path / target, self.path / source)
            remove_tree(staged)
        journal.unlink(missing_ok=True)

    @property
    def _trash(self) -> Path:
        return self.path.with_name(f".{self.path.name}.trash")

    def _return(self, target: Path, source: Path) -> None:
        source.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not any(source.iterdir()):
            source.rmdir()
        target.rename(source)

    def _run_entries(self) -> Iterator[Path]:
        yield from sorted(self.run.iterdir())
        yield from sorted(e for e in self.output.iterdir() if e not in (self.payload, self.manifest))
        for entry in sorted(self.path.iterdir()):
            if entry.name not in _UNPUBLISHED and not entry.name.startswith("."):
                yield entry
