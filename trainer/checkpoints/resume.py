"""Resume checkpoints: Megatron's distributed format, complete or absent, kept for a while.

```
checkpoints/
  iter_0000005/                  renamed into place when complete
    __0_0.distcp .metadata metadata.json     Megatron `torch_dist`: model, optimizer state, master weights
    random/rank_00000.json                   random states of each rank
    state.json                               step, samples consumed, schedule, layout, configuration, file
    sizes provenance.json                          where it came from (see trainer.provenance)
  latest_checkpointed_iteration.txt          a convenience for people and tools; the directories are the truth
```

A save goes to a hidden directory first, so `kill -9` at any moment leaves every earlier checkpoint usable.

Torch's `.metadata` file is a pickle. These checkpoints are therefore for the work directory they were
written in, and are never taken from elsewhere: weights travel as safetensors (see trainer.published).
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling

from trainer.job.distributed import Layout, random_state, restore_random_state, seed_everything, together
from trainer.job.workdir import LOGGER, canonical_json, replace_text

SCHEMA = "vpmoe.resume/1"
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
        try:
            dcp.save(
                torch_strategy.mcore_to_pyt_state_dict(renamed, False),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir),
                planner=planner,
            )
        except dcp.api.CheckpointException as error:
            raise _plain_error(error, f"{checkpoint_dir} could not be written") from error


@dataclass(frozen=True)
class RunState:
    """What a run must find again besides tensors and random states.

    Attributes:
        iteration: Optimizer steps taken.
        config_hash: sha256 of the canonical recipe and seed.
        samplers: Per dataset: `epoch`, `index`, `pack_index_sha256`.
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

    def save(self, tensors: dict[str, Any], state: RunState, provenance: Mapping[str, Any]) -> Path:
        """Write one checkpoint, renames it into place, moves the latest marker, removes what is too old.

        Args:
            tensors: Sharded state dict of model and optimizer.
            state: The rest of the run's state.
            provenance: Written beside it as `provenance.json`.

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
        together(lambda: self._finish(scratch, final, state, provenance))
        return final

    def _prepare(self, scratch: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".*_iter_*"):
            shutil.rmtree(left)  # of a save or a removal that a kill cut short
        scratch.mkdir()

    def _finish(self, scratch: Path, final: Path, state: RunState, provenance: Mapping[str, Any]) -> None:
        _write(scratch / "provenance.json", provenance)
        files = {
            str(path.relative_to(scratch)): path.stat().st_size
            for path in scratch.rglob("*")
            if path.is_file()
        }
        stored = {
            "schema": SCHEMA,
            "layout": self.layout.describe() | {"threads": torch.get_num_threads()},
            "files": files,
            **vars(state),
        }
        _write(scratch / "state.json", stored)
        for path in (scratch / "metadata.json", scratch / "random", scratch):
            _sync(path)
        if final.exists():  # saved again after a stop at the very step
            self._remove(final)
        scratch.rename(final)
        _sync(self.directory)
        replace_text(self.directory / LATEST_NAME, f"{state.iteration}\n")
        for old in self.iterations()[: -self.keep_last]:
            if old not in self.protect and not (self.keep_every and old % self.keep_every == 0):
                self._remove(self.path(old))

    def _remove(self, path: Path) -> None:
        # Renamed first: half a removal must not look like a checkpoint.
        doomed = path.with_name(f".removing_{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)

    def read(self, iteration: int) -> tuple[RunState, dict[str, int]]:
        """Read the plain part of a checkpoint and check that all of its files are there, whole.

        Returns:
            The run state, and the parallel layout that wrote it, with its number of threads a rank.

        Raises:
            CheckpointError: A file is missing, has another size, or is not what it should be.
        """
        path = self.path(iteration)
        try:
            stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: state.json cannot be read ({error}); remove this checkpoint to resume from the one "
                "before"
            ) from error
        if stored.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: schema {stored.get('schema')!r} found, {SCHEMA!r} expected")
        for name, size in stored["files"].items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes"
                raise CheckpointError(
                    f"{path}: {name} {what}, {size} bytes were written; remove this checkpoint to "
                    "resume from the one before"
                )
        fields = ("iteration", "config_hash", "samplers", "schedule", "progress")
        return RunState(**{name: stored[name] for name in fields}), stored["layout"]

    def read_matching(self, iteration: int, expect: RunState) -> RunState:
        """Read the plain part of a checkpoint of this very run.

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
        before = layout.get("threads", threads)  # checkpoints of earlier versions do not say
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


def largest_difference(tensors: Mapping[str, Any], directory: Path) -> float:
    """Largest absolute difference between local tensors and the same tensors of a checkpoint, over all ranks.

    Collective. Works in groups of tensors, so that no second copy of the whole state is in memory at once.

    Args:
        tensors: Flat mapping of any key to Megatron `ShardedTensor`s with data.
        directory: A complete checkpoint.

    Returns:
        0.0 when all are equal bit for bit (NaN never is); infinity where one side is not finite.
    """
    worst = 0.0
    names = sorted(tensors)
    for start in range(0, len(names), 64):
        group = {name: tensors[name] for name in names[start : start + 64]}
        twins = {name: _twin(tensor) for name, tensor in group.items()}
        stored = dist_checkpointing.load(dict(twins), str(directory), validate_access_integrity=False)
        for name, tensor in group.items():
            if not torch.equal(tensor.data, stored[name]):
                apart = (tensor.data.double() - stored[name].double()).abs().max().item()
                worst = max(
                    worst, apart if apart > 0 else float("inf")
                )  # NaN compares false and ends here too
    reduced = torch.tensor([worst], dtype=torch.float64)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return float(reduced.item())


def _plain_error(error: dcp.api.CheckpointException, what: str) -> CheckpointError:
    """Torch's error, a `BaseException` raised on every rank, as one that names its cause."""
    causes = ", ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))
    return CheckpointError(f"{what} ({causes}); earlier checkpoints are intact")


def _twin(tensor: Any) -> Any:
    return replace(tensor, data=torch.empty_like(tensor.data))


def _write(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(canonical_json(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
