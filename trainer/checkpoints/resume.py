"""Resume checkpoints: Megatron's distributed format, complete or absent, kept for a while.

```
checkpoints/
  iter_0000005/                  renamed into place when complete
    __0_0.distcp .metadata metadata.json     Megatron `torch_dist`: model, optimizer state, master weights
    random/rank_00000.json                   random states of each rank
    live/<kind>/                             what sources hold that make samples while the run goes on
    provenance.json                          where it came from (see trainer.checkpoints.provenance)
    state.json                               step, samples consumed, schedule, layout, configuration, size
                                             and checksums of every other file, and its own sha256
  latest_checkpointed_iteration.txt          a convenience for people and tools; the directories are the truth
```

A save goes to a hidden directory first, so `kill -9` at any moment leaves every earlier checkpoint usable.

Torch's `.metadata` file is a pickle. These checkpoints are therefore for the work directory they were
written in, and are never taken from elsewhere: weights travel as safetensors (see
trainer.checkpoints.published). It is opened only if it has the checksum that `state.json` gives it, and names
no code but torch's own for it (see trainer.checkpoints.plain_metadata); a file that `state.json` does not
list is none of a checkpoint, and refused.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling

from trainer.checkpoints.checksums import FileSum, checksums, first_damage
from trainer.checkpoints.plain_metadata import UnsafePickleError, require_plain_metadata
from trainer.contract.canonical import UnstableValueError, canonical_json
from trainer.contract.files import remove_tree, replace_text, sync
from trainer.job.distributed import Layout, random_state, restore_random_state, seed_everything, together
from trainer.job.workdir import LOGGER

SCHEMA = "vpmoe.resume/2"
LIVE_NAME = "live"
LATEST_NAME = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"iter_(\d{7,})")


class CheckpointError(ValueError):
    """A resume checkpoint is damaged or belongs to another run."""


class TorchDistSave(TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format written by torch's own synchronous saver, on a CPU as on a GPU.

    The stock strategy's writer calls `torch.cuda.synchronize()` and broadcasts from
    `torch.cuda.current_device()`, so it cannot save on a machine without CUDA. The bytes on disk and the
    loader are the stock ones. Two of Megatron's translation helpers are private names; both are used here
    and nowhere else.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write all sharded values of `sharded_state_dict` into `checkpoint_dir`."""
        renamed, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        # Inside its files every tensor is a zip archive. Their own checksums, which no reader looks at, halve
        # the speed of writing; the files get better ones when they are there.
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            dcp.save(
                torch_strategy.mcore_to_pyt_state_dict(renamed, False),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir),
                planner=planner,
            )
        except dcp.api.CheckpointException as error:
            raise _plain_error(error, f"{checkpoint_dir} could not be written") from error
        finally:
            torch.serialization.set_crc32_options(before)


@dataclass(frozen=True)
class RunState:
    """What a run must find again besides tensors and random states.

    Attributes:
        iteration: Optimizer steps taken.
        config_hash: sha256 of the canonical recipe and seed.
        samplers: Per data set or other source of samples, its place: `epoch`, `index`, `pack_index_sha256`.
        schedule: Steps planned and the schedule's parameters.
        progress: Token counts and measured losses that the summary reports over the whole run.
    """

    iteration: int
    config_hash: str
    samplers: Mapping[str, Mapping[str, Any]]
    schedule: Mapping[str, Any]
    progress: Mapping[str, Any]


class Checkpoints:
    """The resume checkpoints of one work directory. All methods that save or load are collective.

    Args:
        directory: `work_dir/checkpoints`.
        layout: Parallel layout of this run.
        keep_last: How many of the newest checkpoints stay.
        keep_every: Checkpoints at multiples of this step stay too; 0 for none.
        protect: Steps whose checkpoints stay in any case.
    """

    strategy: type[TorchDistSaveShardedStrategy] = TorchDistSave

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        *,
        keep_last: int,
        keep_every: int = 0,
        protect: Collection[int] = (),
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last = {keep_last}: at least the newest checkpoint must stay")
        self.directory = directory
        self.layout = layout
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.protect = frozenset(protect)

    def path(self, iteration: int) -> Path:
        """Directory of the checkpoint of one step."""
        return self.directory / f"iter_{iteration:07d}"

    def iterations(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, the same answer on every rank; None when there is none."""
        answer: list[Any] = [self.iterations()[-1:] if self.layout.leads else None]
        dist.broadcast_object_list(answer, src=0)
        return answer[0][0] if answer[0] else None

    def save(
        self,
        tensors: dict[str, Any],
        state: RunState,
        provenance: Mapping[str, Any],
        *,
        live: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write one checkpoint, renames it into place, moves the latest marker, removes what is too old.

        Args:
            tensors: Sharded state dict of model and optimizer.
            state: The rest of the run's state.
            provenance: Written beside it as `provenance.json`.
            live: Writes what the sources of samples hold into `live/`, on every rank.

        Returns:
            The checkpoint's directory.
        """
        final = self.path(state.iteration)
        scratch = self.directory / f".saving_{final.name}"
        together(lambda: self._prepare(scratch))
        dist_checkpointing.save(tensors, str(scratch), sharded_strategy=self.strategy("torch_dist", 1))
        random_path = scratch / "random" / f"rank_{self.layout.rank:05d}.json"
        together(lambda: random_path.parent.mkdir())
        together(lambda: _write(random_path, random_state(self.layout.device)), only_leader=False)
        together(lambda: _write(scratch / "provenance.json", provenance))
        if live is not None:
            together((scratch / LIVE_NAME).mkdir)
            together(lambda: live(scratch / LIVE_NAME), only_leader=False)
            together(lambda: sync(scratch / LIVE_NAME))
        written: list[Any] = [_files(scratch) if self.layout.leads else None]
        dist.broadcast_object_list(written, src=0)
        files = checksums(scratch, written[0])
        together(lambda: self._finish(scratch, final, state, files))
        return final

    def _prepare(self, scratch: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".*_iter_*"):
            remove_tree(left)  # of a save or a removal that a kill cut short
        scratch.mkdir()

    def _finish(self, scratch: Path, final: Path, state: RunState, files: Mapping[str, FileSum]) -> None:
        stored = {
            "schema": SCHEMA,
            "layout": self.present_layout(),
            "files": {name: found.describe() for name, found in files.items()},
            **vars(state),
        }
        _write(scratch / "state.json", stored | {"sha256": _sha256(stored)})
        for path in (scratch / "metadata.json", scratch / "random", scratch):
            sync(path)
        if final.exists():  # saved again after a stop at the very step
            self._remove(final)
        scratch.rename(final)
        sync(self.directory)
        replace_text(self.directory / LATEST_NAME, f"{state.iteration}\n")
        for old in self.iterations()[: -self.keep_last]:
            if old not in self.protect and not (self.keep_every and old % self.keep_every == 0):
                self._remove(self.path(old))

    def remove_after(self, iteration: int) -> None:
        """Remove the checkpoints of all later steps, because those steps are about to be run again."""

        def remove() -> None:
            for later in reversed([step for step in self.iterations() if step > iteration]):
                self._remove(self.path(later))
            replace_text(self.directory / LATEST_NAME, f"{iteration}\n")

        together(remove)

    def _remove(self, path: Path) -> None:
        # Renamed first: half a removal must not look like a checkpoint.
        doomed = path.with_name(f".removing_{path.name}")
        path.rename(doomed)
        remove_tree(doomed)

    def present_layout(self) -> dict[str, Any]:
        """Return what decides how sums are rounded: the parallel layout, the kind of device, threads."""
        return self.layout.describe() | {
            "device": self.layout.device.type,
            "threads": torch.get_num_threads(),
        }

    def read(self, iteration: int) -> tuple[RunState, dict[str, Any]]:
        """Read the plain part of a checkpoint and check that all of its files are there, in their size.

        Returns:
            The run state, and the layout that wrote it, of `present_layout`.

        Raises:
            CheckpointError: A file is missing, has another size, or is not what it should be.
        """
        stored = self._stored(iteration)
        for name, entry in stored["files"].items():
            file, size = self.path(iteration) / name, FileSum.of(entry).bytes
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes"
                raise self._damaged(iteration, f"{name} {what}, {size} bytes were written")
        if added := set(_files(self.path(iteration))) - stored["files"].keys() - {"state.json"}:
            raise self._damaged(iteration, f"{min(added)} was added after it was written")
        fields = ("iteration", "config_hash", "samplers", "schedule", "progress")
        return RunState(**{name: stored[name] for name in fields}), stored["layout"]

    def verify(self, iteration: int) -> None:
        """Compare every file of a checkpoint, byte for byte, with the checksums taken when it was written.

        Collective: each rank reads a share of the blocks.

        Raises:
            CheckpointError: A file is damaged; the message names it, and the way to the checkpoint before.
        """
        files = {name: FileSum.of(entry) for name, entry in self._stored(iteration)["files"].items()}
        damage = first_damage(self.path(iteration), files)
        if damage is not None:
            raise self._damaged(iteration, damage)

    def _stored(self, iteration: int) -> dict[str, Any]:
        """Read `state.json` and check it against its own checksum."""
        path = self.path(iteration)
        try:
            text = (path / "state.json").read_text(encoding="utf-8")
            stored: dict[str, Any] = json.loads(text)
            if stored["schema"] != SCHEMA:
                raise CheckpointError(
                    f"{path}: schema {stored['schema']!r} found, {SCHEMA!r} expected: another version of the "
                    "trainer wrote it; go on with that version, or begin again with execution.resume = false"
                )
            sha256 = stored.pop("sha256")
            whole = _text(stored | {"sha256": sha256}) == text and sha256 == _sha256(stored)
        except CheckpointError:
            raise
        except (OSError, ValueError, LookupError, TypeError, RecursionError, UnstableValueError) as error:
            raise self._damaged(iteration, f"state.json cannot be read ({error})") from error
        if not whole:
            raise self._damaged(iteration, "state.json is damaged: its sha256 is another than was written")
        return stored

    def _damaged(self, iteration: int, what: str) -> CheckpointError:
        """Return the error of a damaged checkpoint, with the way on; none is left out unasked."""
        path = self.path(iteration)
        before = [self.path(step).name for step in self.iterations() if step < iteration][-1:]
        after = [self.path(step).name for step in self.iterations() if step > iteration]
        those = f", and those after it ({', '.join(after)})," if after else ""
        way = f"resume from the one before, {before[0]}" if before else "begin again: there is none before it"
        return CheckpointError(
            f"{path}: {what}; remove this checkpoint{those} and start the same job again to {way}"
        )

    def read_matching(self, iteration: int, expect: RunState) -> RunState:
        """Read the plain part of a checkpoint of this very run, and verify all of its files. Collective.

        The samplers check their own places when they are set to them.

        Args:
            iteration: Which one.
            expect: The fresh run's state, to compare configuration, schedule and data sets with.

        Raises:
            CheckpointError: Configuration, schedule, data sets or layout differ (naming both), or a file is
                damaged.
        """
        path = self.path(iteration)
        state, layout = self.read(iteration)
        for name, stored, ours, remedy in (
            ("configuration", state.config_hash, expect.config_hash, "use another work directory for it"),
            ("schedule", dict(state.schedule), dict(expect.schedule), "use another work directory for it"),
            ("data sets", sorted(state.samplers), sorted(expect.samplers), "give the job the same inputs"),
        ):
            if stored != ours:
                raise CheckpointError(f"{path} has {name} {stored}, this run has {ours}; {remedy}")
        for name in ("tp", "ep", "pp"):
            size = self.layout.describe()[name]
            if layout[name] != size:
                raise CheckpointError(
                    f"{path} was made with {name} = {layout[name]}, this run has {name} = {size}; only dp "
                    f"may change on resume. Set {name} = {layout[name]}, or start from published weights"
                )
        self.verify(iteration)
        return state

    def load(self, iteration: int, tensors: dict[str, Any], *, seed: int) -> dict[str, Any]:
        """Load the tensors of a checkpoint and put the random states back.

        Args:
            iteration: Which one.
            tensors: Sharded state dict with the tensors to fill.
            seed: Seeds the ranks when there is another number of them than when the checkpoint was made.

        Returns:
            The loaded state dict.
        """
        path = self.path(iteration)
        try:
            require_plain_metadata(path)
        except UnsafePickleError as error:
            raise CheckpointError(f"{error}; earlier checkpoints are intact") from error
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(
                tensors, str(path), strict=StrictHandling.RAISE_ALL
            )
        except dcp.api.CheckpointException as error:
            raise _plain_error(error, f"{path} could not be read") from error
        _, layout = self.read(iteration)
        if layout["world"] == self.layout.world:
            restore_random_state(self.random_state(iteration), self.layout.device)
        else:
            # Other ranks than before: their streams cannot go on, so each gets a new one, the same each time.
            seed_everything(seed + iteration, self.layout.device)
            LOGGER.info(
                "%d ranks instead of %d: random states seeded anew", self.layout.world, layout["world"]
            )
        threads = torch.get_num_threads()
        before = layout["threads"]
        if self.layout.device.type == "cpu" and before != threads:
            LOGGER.warning(
                "%d threads instead of %d: sums on the CPU may round differently, so the run goes on with "
                "the same state, but perhaps not bit for bit; OMP_NUM_THREADS=%d keeps the bits",
                threads,
                before,
                before,
            )
        return loaded

    def random_state(self, iteration: int) -> dict[str, Any]:
        """Return the random states of this rank as a checkpoint holds them."""
        path = self.path(iteration) / "random" / f"rank_{self.layout.rank:05d}.json"
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _plain_error(error: dcp.api.CheckpointException, what: str) -> CheckpointError:
    """Torch's error, a `BaseException` raised on every rank, as one that names its cause."""
    causes = ", ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))
    return CheckpointError(f"{what} ({causes}); earlier checkpoints are intact")


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _text(value: Any) -> str:
    return canonical_json(value, indent=1) + "\n"


def _sha256(stored: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(stored).encode()).hexdigest()


def _write(path: Path, value: Any) -> None:
    path.write_text(_text(value), encoding="utf-8")
    sync(path)
