"""The trainer as a Dagster resource: starts a job by a launcher, watches it, and leaves nothing behind."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from trainer.contract.attempts import Attempt, attempt
from trainer.contract.files import replace_text
from trainer.contract.schema.base import ConfigError, parse, plain
from trainer.contract.schema.job import Job, Part
from trainer.contract.status import DONE, FAILED, INTERRUPTED, JOB_NAME
from vpmoe_assets.codebase.running import running_from
from vpmoe_assets.resources import workers
from vpmoe_assets.resources.job_files import OutputIncompleteError, WorkFiles
from vpmoe_assets.resources.launcher import (
    Handle,
    Launch,
    Launcher,
    LauncherNotAvailableError,
    LaunchError,
    available,
    find,
    require_followed,
)
from vpmoe_assets.resources.processes import ProcessesRemainError, new_marker
from vpmoe_assets.resources.reaping import settle
from vpmoe_assets.resources.tail import MetricsTail
from vpmoe_assets.resources.tracking import WandbKeyMissingError, wandb_environment
from vpmoe_assets.resources.watcher import Limits, StalledError, Watcher
from vpmoe_assets.resources.worker_places import places

_AFTER_FAILURE_S = 30.0


@dataclass(frozen=True)
class TrainerResult:
    """A finished job.

    Attributes:
        summary: What the trainer says of its deliverable (`summary.json`).
        returncode: 0.
        resumed_from: Step of the checkpoint it went on from, or None for a job that began at the beginning.
        reused: Whether the job had been finished before and was not run again.
        seconds: Wall time of this run.
        work_dir: Where its log, metrics and resume checkpoints are.
        output_dir: Where `payload/` and `summary.json` are.
        devices: Names of the GPUs, empty on a CPU.
        execution: How it ran, for the record; never part of an artifact's identity.
        attempts: Every start of it, those that were cut short too.
    """

    summary: dict[str, Any]
    returncode: int
    resumed_from: int | None
    reused: bool
    seconds: float
    work_dir: Path
    output_dir: Path
    devices: tuple[str, ...]
    execution: dict[str, Any]
    attempts: tuple[Attempt, ...] = ()


class TrainerResource(dg.ConfigurableResource):
    """Runs jobs of the trainer. Every setting says how a job is executed; none is part of what it makes."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where tensors live.")
    nproc: int = Field(default=1, description="Processes; on CUDA one GPU each. Equals dp x tp.")
    dp: int = Field(default=1, description="Data-parallel size.")
    tp: int = Field(default=1, description="Tensor-parallel size.")
    ep: int = Field(default=1, description="Expert-parallel size; divides dp.")
    score_workers: int = Field(
        default=1,
        ge=1,
        description="Processes that score for a teacher, a share of the shards each; on CUDA one GPU each.",
    )
    launcher: str = Field(
        default="local", description=f"What starts the processes: {' or '.join(available())}."
    )
    launcher_settings: dict[str, Any] = Field(
        default={}, description="Of the launcher, for this run, before what launchers.toml says."
    )
    wandb: Literal["offline", "online", "disabled"] = Field(
        default="offline",
        description="Weights & Biases; the key comes from WANDB_API_KEY or netrc, never from here.",
    )
    resume: bool = Field(default=True, description="Go on from the last checkpoint of an interrupted job.")
    per_layer_router_metrics: bool = Field(default=False, description="Log router health layer by layer.")
    stall_timeout_s: float = Field(default=300.0, description="Longest time without a heartbeat, in seconds.")
    progress_timeout_s: float = Field(
        default=3600.0,
        description="Longest time at one step or in one save, in seconds, though the heart beats.",
    )
    grace_s: float = Field(
        default=600.0, description="Time to write a checkpoint and exit when a run is cancelled, in seconds."
    )
    lease_wait_s: float = Field(
        default=86400.0, description="How long to wait for GPUs that others hold, in seconds."
    )
    host_silence_s: float = Field(
        default=3600.0,
        description="How long the job of another machine is silent, in seconds, until it is taken for dead.",
    )
    poll_s: float = Field(default=1.0, description="Time between two looks at the job's files, in seconds.")

    def execution(self) -> dict[str, Any]:
        """Return the settings that the job and the record are told."""
        names = (
            "device",
            "nproc",
            "dp",
            "tp",
            "ep",
            "launcher",
            "wandb",
            "resume",
            "per_layer_router_metrics",
        )
        return {name: getattr(self, name) for name in names}

    def alone(self) -> "TrainerResource":
        """Return the same settings with a single process, for jobs that do not spread over several."""
        return self.with_settings(**dict.fromkeys(("nproc", "dp", "tp", "ep"), 1))

    def with_settings(self, **changed: Any) -> "TrainerResource":
        """Return the same settings, some of them changed."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        return TrainerResource(**settings | changed)

    def run(
        self,
        context: dg.AssetExecutionContext,
        *,
        command: str,
        asset: str,
        experiment: str,
        recipe: Mapping[str, Any],
        recipe_fingerprint: str,
        seed: int,
        inputs: Mapping[str, tuple[Path | str, str]],
        provenance: Mapping[str, Any],
        sources: Path,
        work_dir: Path,
        output_dir: Path,
        verify_resume: bool = True,
        parts: Mapping[str, Part] | None = None,
        execution: Mapping[str, Any] | None = None,
    ) -> TrainerResult:
        """Run one job to its end; the caller holds the lock of the work directory.

        A job with the same fingerprint that is finished is not run again; one that was interrupted goes on. A
        job in parts is only asked for those that are not finished, so it is always run.
        When the Dagster run is cancelled, the trainer writes a checkpoint, no process is left, and the
        interrupt goes on.

        Args:
            context: Dagster context of the step: log, asset key, run id.
            command: Trainer command, such as "train".
            asset: Bare name of the asset.
            experiment: Name of the experiment.
            recipe: Resolved recipe.
            recipe_fingerprint: Identity of recipe, sources and inputs.
            seed: Seed of the job.
            inputs: Path and content digest of each input by its name.
            provenance: `git_sha`, `git_dirty`, `source_digest`, `lock_digest`, `snapshot`.
            sources: Directory of the sources that the job runs from, whatever is edited meanwhile.
            work_dir: Where the job works and where a restart goes on.
            output_dir: Where `payload/` and `summary.json` are to appear.
            verify_resume: Whether a training run repeats its last steps from their checkpoint at the end.
            parts: Of an evaluation, by checkpoint; the caller holds their work directories' locks as well.
            execution: Keys of the job's `execution` beside the settings.

        Raises:
            dagster.Failure: The job cannot be started, failed, stalled or left an incomplete deliverable. The
                message says what was found and what to do, with the last lines of output and the path of the
                rest.
        """
        files = WorkFiles(work_dir, output_dir, in_parts=bool(parts) or command == "score")
        work_dir.mkdir(parents=True, exist_ok=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            job = parse(
                Job,
                {
                    "schema": "vpmoe.job/1",
                    "command": command,
                    "asset": asset,
                    "experiment": experiment,
                    "recipe": dict(recipe),
                    "recipe_fingerprint": recipe_fingerprint,
                    "seed": seed,
                    "inputs": {
                        name: {"path": str(path), "digest": made} for name, (path, made) in inputs.items()
                    },
                    "execution": {**self.execution(), "verify_resume": verify_resume, **(execution or {})},
                    "provenance": dict(provenance),
                    "work_dir": str(work_dir),
                    "output_dir": str(output_dir),
                    "parts": {name: plain(part) for name, part in (parts or {}).items()},
                },
                origin="job",
            )
            steps = job.train_recipe().steps if command == "train" else None
            place = find(self.launcher)
            environment = running_from(sources, wandb_environment(self.wandb, os.environ))
        except (ConfigError, LauncherNotAvailableError, WandbKeyMissingError) as error:
            raise dg.Failure(f"{asset}: the job cannot be started. {error}", allow_retries=False) from error
        self.take_over(context, work_dir)
        self._require_own(files, recipe_fingerprint)
        if not parts and (summary := self._finished(context, files, asset, recipe_fingerprint)) is not None:
            last = files.attempts()[-1:]
            resumed_from = last[0].resumed_from if last else None
            return self._result(files, summary, resumed_from, True, 0.0, ())
        replace_text(work_dir / JOB_NAME, job.model_dump_json(by_alias=True, indent=1) + "\n")
        return self._launch(context, place, job, files, sources, environment, steps)

    def _finished(
        self, context: dg.AssetExecutionContext, files: WorkFiles, asset: str, fingerprint: str
    ) -> dict[str, Any] | None:
        """Return the summary of the very job that is asked for, where it was finished before."""
        if not self.resume or files.status()[0] != DONE or files.fingerprint() != fingerprint:
            return None
        try:
            summary = files.deliverable()
        except OutputIncompleteError as error:
            context.log.warning(f"{asset}: running the finished job again, because {error}")
            return None
        context.log.info(f"{asset}: the job in {files.work_dir} is finished; not run again")
        return summary

    def take_over(self, context: dg.AssetExecutionContext, work_dir: Path) -> None:
        """Make sure that nobody else works in a directory: ends what a killed orchestrator left there.

        Args:
            context: Dagster context of the step: its log.
            work_dir: Of a job; the caller holds its lock.

        Raises:
            dagster.Failure: A job in it is being run by somebody else, or may still run elsewhere.
        """
        for place in (work_dir, *places(work_dir)):
            try:
                require_followed(place, self.launcher, os.environ)
                left = settle(
                    place,
                    grace_s=self.grace_s,
                    silence_s=self.host_silence_s,
                    log=context.log.warning,
                )
            except (ValueError, LaunchError, ProcessesRemainError) as error:
                raise dg.Failure(str(error), allow_retries=False) from error
            if left is not None and left.note:
                raise dg.Failure(
                    f"Work directory {place}: the job of {left.asset} in it {left.note}. Wait for it, or "
                    "cancel that run.",
                    allow_retries=False,
                )
        WorkFiles(work_dir, work_dir).note_end()

    def _require_own(self, files: WorkFiles, fingerprint: str) -> None:
        """Refuse a directory with the work of another recipe."""
        found = files.fingerprint()
        if found not in (None, fingerprint):
            raise dg.Failure(
                f"Work directory {files.work_dir}: it holds work of another recipe (fingerprint {found}, "
                f"asked for {fingerprint}). Remove that directory, or give this job its own.",
                allow_retries=False,
            )

    def _launch(
        self,
        context: dg.AssetExecutionContext,
        place: Launcher,
        job: Job,
        files: WorkFiles,
        sources: Path,
        environment: dict[str, str],
        steps: int | None,
    ) -> TrainerResult:
        begun = time.monotonic()
        resumed_from = files.last_checkpoint() if self.resume else None
        watcher = self._watcher(context, files, steps, resumed_from)
        launch = Launch(
            command=job.command,
            experiment=job.experiment,
            asset=job.asset,
            work_dir=files.work_dir,
            sources=sources,
            device=self.device,
            nproc=self.nproc,
            environment=environment,
            marker=new_marker(),
            grace_s=self.grace_s,
            wait_s=self.lease_wait_s,
            dagster_run_id=context.run.run_id,
            settings=self.launcher_settings,
        )
        try:
            if launch.command == "score" and self.score_workers > 1:
                self._shared(context, place, launch, files, job)
            with (
                place.reserve(launch, context.log.info) as handle,
                attempt(files.noted, resumed_from, job.provenance.snapshot),
            ):
                if not handle.attached:
                    files.clear_status()
                returncode = self._to_its_end(context, handle, watcher, files, job.asset)
                summary = self._delivered(files, job, returncode)
        except LaunchError as error:
            raise dg.Failure(f"{job.asset}: {error}", allow_retries=False) from error
        seconds = time.monotonic() - begun
        return self._result(files, summary, resumed_from, False, seconds, handle.devices)

    def _shared(
        self, context: dg.AssetExecutionContext, place: Launcher, launch: Launch, files: WorkFiles, job: Job
    ) -> None:
        """Let workers do a share of the work each; the job then finds it done, and delivers."""
        starts = workers.launches(launch, self.score_workers)
        own = [WorkFiles(start.work_dir, files.output_dir, in_parts=True) for start in starts]
        with (
            workers.reserve(place, starts, context.log.info) as handle,
            attempt(files.noted, None, job.provenance.snapshot),
        ):
            watchers = [self._watcher(context, each, None, None) for each in own]
            watcher = workers.WorkersWatcher(handle, watchers, self.poll_s)
            try:
                self._to_its_end(context, handle, watcher, files, job.asset)
            finally:
                workers.tidy(files.work_dir)
            if handle.failed is not None:
                number, code = handle.failed
                ended = f"signal {-code}" if code < 0 else f"exit code {code}"
                said = own[number].status()[1]
                which = f"worker {number} of {len(starts)}"
                raise self._failure(own[number], job.asset, f"{which}: {said or f'ended with {ended}'}")

    def _watcher(
        self, context: dg.AssetExecutionContext, files: WorkFiles, steps: int | None, resumed: int | None
    ) -> Watcher:
        metrics = MetricsTail(files.metrics, total_steps=steps, after_step=-1 if resumed is None else resumed)
        limits = Limits(self.stall_timeout_s, self.progress_timeout_s, _AFTER_FAILURE_S, self.poll_s)
        return Watcher(context, files, metrics, limits)

    def _to_its_end(
        self,
        context: dg.AssetExecutionContext,
        handle: Handle,
        watcher: Watcher | workers.WorkersWatcher,
        files: WorkFiles,
        asset: str,
    ) -> int:
        """Start and follow a job. However this ends, no process of the job is left."""
        try:
            handle.start()
            how = "followed" if handle.attached else "started"
            context.log.info(f"{asset}: {how}; log {files.log}, all output {files.console}")
            returncode = watcher.follow(handle)
        except StalledError as stall:
            handle.stop(grace_s=min(self.grace_s, _AFTER_FAILURE_S), stack=True, log=context.log.warning)
            raise self._failure(files, asset, str(stall)) from stall
        except BaseException as reason:
            try:
                handle.stop(grace_s=self.grace_s, log=context.log.warning)
            finally:
                watcher.look(all_of_it=True)
                step = files.last_checkpoint()
                kept = (
                    f"its checkpoint of step {step} is complete; run it again to go on"
                    if step
                    else "no checkpoint"
                )
                context.log.warning(f"{asset}: stopped ({type(reason).__name__}); {kept}")
            raise
        # Helpers can be left, and, when torchrun was killed, ranks that are writing a checkpoint.
        handle.stop(grace_s=self.grace_s, log=context.log.warning)
        return returncode

    def _delivered(self, files: WorkFiles, job: Job, returncode: int) -> dict[str, Any]:
        """Return the summary of a job that has ended well, with all that it was to deliver."""
        self._require_done(files, job.asset, returncode)
        try:
            if not job.parts:
                return files.deliverable()
            for part in job.parts.values():
                WorkFiles(Path(part.work_dir), Path(part.output_dir)).deliverable()
            return files.summary()
        except OutputIncompleteError as error:
            raise self._failure(files, job.asset, str(error)) from error

    def _require_done(self, files: WorkFiles, asset: str, returncode: int) -> None:
        state, reason = files.status()
        ended = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        if state == FAILED:
            raise self._failure(files, asset, reason or f"failed without a reason ({ended})")
        if state == INTERRUPTED:
            raise self._failure(
                files,
                asset,
                "the trainer was interrupted, by a rank that failed or by a signal from outside this run",
            )
        if returncode != 0 or state != DONE:
            raise self._failure(
                files, asset, f"the trainer ended with {ended} and STATUS {state or 'unwritten'!r}"
            )

    def _failure(self, files: WorkFiles, asset: str, reason: str) -> dg.Failure:
        step = files.last_checkpoint()
        if files.in_parts:
            again = "What it has finished is kept; run it again to go on with the rest."
        elif step and self.resume:
            again = f"Run it again to go on from the checkpoint of step {step}."
        else:
            again = "There is no checkpoint to go on from."
        return dg.Failure(
            f"{asset}: {reason}. {again}\nLast lines of {files.console}:\n{files.evidence()}",
            metadata={
                "log": dg.MetadataValue.path(files.log),
                "console": dg.MetadataValue.path(files.console),
                "work_dir": dg.MetadataValue.path(files.work_dir),
            },
            allow_retries=False,
        )

    def _result(
        self,
        files: WorkFiles,
        summary: dict[str, Any],
        resumed_from: int | None,
        reused: bool,
        seconds: float,
        devices: tuple[str, ...],
    ) -> TrainerResult:
        return TrainerResult(
            summary=summary,
            returncode=0,
            resumed_from=resumed_from,
            reused=reused,
            seconds=seconds,
            work_dir=files.work_dir,
            output_dir=files.output_dir,
            devices=devices,
            execution=self.execution(),
            attempts=files.attempts(),
        )
