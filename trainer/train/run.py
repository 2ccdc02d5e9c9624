"""The `train` command: from a job to published weights, through as many restarts as it takes."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.checkpoints.provenance import Provenance, config_hash
from trainer.checkpoints.published import load_published, save_published
from trainer.checkpoints.resume import Checkpoints
from trainer.contract.disk import DRIFT_STEPS
from trainer.contract.layers import moe_layers
from trainer.contract.schema.base import plain
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.status import PAYLOAD_NAME, SUMMARY_NAME
from trainer.job.deliverable import WRITING_NAME, write_summary
from trainer.job.distributed import Layout, agree, peak_device_bytes, session, together
from trainer.job.lifecycle import Interrupted
from trainer.job.metrics import MetricsLog, Value
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir
from trainer.losses.common.mixture import Mixture
from trainer.losses.common.objective import load_objective
from trainer.model.backend import load_backend
from trainer.model.gpt import build_model
from trainer.model.init import require_filled
from trainer.train.drift import Drift, resume_drift
from trainer.train.engine import Engine, StepResult, closed_on_failure, ran_under
from trainer.train.heldout import describe_held_out
from trainer.train.inputs import TEACHER_INPUT, open_data
from trainer.train.live import open_live
from trainer.train.room import require_room
from trainer.train.tracking import NoTracker, Tracker, open_tracker


def train(job: Job, work: WorkDir, stop: StopRequest, *, verify_resume: bool = True) -> None:
    """Train as a job says and write its deliverable.

    Args:
        job: A `train` job.
        work: Its work directory; where it holds a checkpoint and the job allows it, the run goes on from
            there.
        stop: Asks for a clean stop.
        verify_resume: Repeats the last steps from their checkpoint and reports the difference in the summary.

    Raises:
        Interrupted: Stopped as asked; the last step is saved.
        ValueError: Configuration, data, checkpoint or published weights are not as they should be.
        NoRoomError: The plan of its memory or its disk does not fit this machine.
        NonFiniteError: The loss is NaN or infinite; the checkpoints before stay.
    """
    recipe = job.train_recipe()
    load_backend(recipe.training.backend)
    load_objective(recipe.objective).refuse(recipe)
    execution = job.execution
    with session(execution.device, tp=execution.tp, ep=execution.ep, dp=execution.dp) as layout:
        require_room(job, recipe, layout, verify_resume=verify_resume)
        Run(job, recipe, work, stop, layout, verify_resume=verify_resume).complete()


@dataclass(frozen=True)
class Trained:
    """What is left of a training when its engine is gone: plain values, nothing as large as a model.

    Attributes:
        progress: Counts and losses of the whole run.
        mixture: The kinds of samples that were trained on.
        parameters: Trainable numbers of the whole model.
        files: Names of the published files.
    """

    progress: Mapping[str, Any]
    mixture: Mixture
    parameters: int
    files: list[str]


class Run:
    """One process's part in a training run: the cadence around an `Engine`."""

    def __init__(
        self,
        job: Job,
        recipe: TrainRecipe,
        work: WorkDir,
        stop: StopRequest,
        layout: Layout,
        *,
        verify_resume: bool = True,
    ) -> None:
        self.job, self.recipe, self.work, self.stop, self.layout = job, recipe, work, stop, layout
        self.started = time.time()
        self.settings = recipe.training
        self.config_hash = config_hash(plain(recipe), job.seed)
        self.data = open_data(job, recipe, cache_dir=work.path / "pack_index")
        self.provenance = Provenance(job, plain(recipe), layout, started_unix_s=self.started)
        self.drift_from = max(0, recipe.steps - DRIFT_STEPS) if verify_resume else None
        self.checkpoints = Checkpoints(
            work.checkpoints,
            layout,
            keep_last=self.settings.keep_last,
            keep_every=self.settings.keep_every,
            protect=set() if self.drift_from is None else {self.drift_from},
        )
        self.resumed_from: int | None = None
        self.saved: int | None = None

    def engine(self, *, drawn: bool = True, keeps: bool = True) -> Engine:
        """Return a fresh engine at step 0.

        Args:
            keeps: Keep what live sources make in the work directory; the resume check keeps nothing.
            drawn: Draw the weights from the seed; False leaves them NaN, to be loaded, which saves a
                full-size run the drawing of six billion numbers.
        """
        device = self.layout.device
        model = build_model(
            self.recipe.architecture,
            dtype=Engine.dtype(self.settings),
            device=device.type,
            seed=self.job.seed if drawn else None,
            backend=self.settings.backend,
        )
        return Engine(
            model,
            self.recipe,
            self.data,
            self.layout,
            seed=self.job.seed,
            config_hash=self.config_hash,
            live=open_live(self.job, self.recipe, self.layout, self.work, keeps=keeps),
        )

    def start(self) -> Engine:
        """Return an engine at the newest checkpoint, or at the parent's weights, or at the seed's."""
        newest = self.checkpoints.latest()
        resumes = newest is not None and self.job.execution.resume
        began = time.perf_counter()
        engine = self.engine(drawn=not resumes and self.recipe.init != "checkpoint")
        LOGGER.info(
            "%s: %d parameters on %s, %s, built in %.1f s; samples of %d tokens, in an epoch %s",
            self.job.asset,
            engine.parameters(),
            self.layout.device,
            self.layout.describe(),
            time.perf_counter() - began,
            self.recipe.seq_len,
            ", ".join(f"{count} {name}" for name, count in self.data.num_samples().items()),
        )
        with closed_on_failure(engine):
            if newest is not None and resumes:
                self.go_on(engine, newest)
            else:
                if newest is not None:
                    together(lambda: shutil.rmtree(self.work.checkpoints))
                    LOGGER.warning("resume = false: the checkpoints of the work directory were removed")
                if self.recipe.init == "checkpoint":
                    parent = self.parent()
                    load_published(engine.model, parent, architecture=self.recipe.architecture)
                    together(lambda: require_filled(engine.model, parent), only_leader=False)
                    engine.weights_changed()
                    LOGGER.info("weights of %s; step 0, no optimizer state", parent)
            engine.progress.goes_on(engine.iteration, self.checkpoints.present_layout())
        return engine

    def go_on(self, engine: Engine, newest: int) -> None:
        """Bring an engine to the newest checkpoint, or to the one that the resume check starts from.

        The check repeats the steps after `drift_from` here and asks for equal bits, and sums over ranks and
        threads are rounded as the layout has them: dp = 2 and dp = 1 agree to round-off alone. It can compare
        like with like only where all steps after `drift_from` were run under the present layout. Where some
        were run under another one, they are run again (`DRIFT_STEPS` at most), and their checkpoints go.
        """
        self.require_drift_checkpoint(newest)
        step = newest
        if self.drift_from is not None and newest > self.drift_from:
            state, _ = self.checkpoints.read(newest)
            if not ran_under(state.progress, self.drift_from, self.checkpoints.present_layout()):
                step = self.drift_from
        engine.resume(self.checkpoints, step)
        self.resumed_from = self.saved = step
        LOGGER.info("resumed from %s", self.checkpoints.path(step))
        if step != newest:
            self.checkpoints.remove_after(step)
            LOGGER.warning(
                "steps %d to %d were run under another layout than the present %s; they are run again, so "
                "that the resume check compares like with like",
                step + 1,
                newest,
                self.checkpoints.present_layout(),
            )

    def require_drift_checkpoint(self, newest: int) -> None:
        """Refuse at the start what the resume check could not do at the end.

        Raises:
            ValueError: The run is past the step that the check resumes from, and that step was not saved.
        """
        wanted = self.drift_from
        if wanted is not None and wanted < newest and wanted not in self.checkpoints.iterations():
            raise ValueError(
                f"verify_resume needs the checkpoint of step {wanted}, and {self.work.checkpoints} goes on "
                f"from step {newest} without it: it was removed, or an earlier start ran with "
                f"--no-verify-resume; start with that, or remove the checkpoints after step {wanted}"
            )

    def parent(self) -> Path:
        """Return the published checkpoint among the inputs that is not the teacher's.

        Raises:
            ValueError: There is none, or more than one.
        """
        paths = [Path(given.path) for name, given in self.job.inputs.items() if name != TEACHER_INPUT]
        found = [path for path in paths if (path / "config.json").is_file()]
        if len(found) != 1:
            raise ValueError(
                "init = 'checkpoint' needs exactly one input with published weights (a config.json), found "
                f"{len(found)} among {', '.join(self.job.inputs)}"
            )
        return found[0]

    def complete(self) -> None:
        """Train to the end, publish, check the resume if asked, and write the summary last.

        The check builds an engine of its own. The trained one lives in the frame of `trained` alone and is
        gone when that returns: weights, gradients, master weights and optimizer state of a full-size model
        fit a device once.
        """
        trained = self.trained()
        drift = None
        if self.drift_from is not None:
            self.work.at("verify resume", self.recipe.steps)
            drift = resume_drift(
                lambda: self.engine(drawn=False, keeps=False),
                self.checkpoints,
                self.drift_from,
                self.recipe.steps,
            )
            LOGGER.info("%s", drift)
        summary = self.summary(trained, drift)
        together(lambda: write_summary(Path(self.job.output_dir), summary))

    def trained(self) -> Trained:
        """Train to the end and publish; what is returned holds nothing of the engine."""
        self.work.at("build", 0)
        engine = self.start()
        with closed_on_failure(engine):
            log = MetricsLog(self.work.metrics, resume_step=engine.iteration) if self.layout.leads else None
            tracker = self.tracker()
            failed = True
            try:
                self.loop(engine, log, tracker)
                failed = False
            except Interrupted:
                failed = False  # stopped as asked, and it goes on later
                raise
            finally:
                tracker.close(failed=failed)
                if log is not None:
                    log.close()
            files = self.publish(engine)
        trained = Trained(engine.progress.describe(), engine.objective.mixture, engine.parameters(), files)
        engine.close()
        return trained

    def tracker(self) -> Tracker:
        """Weights & Biases on rank 0, nothing elsewhere."""
        if not self.layout.leads:
            return NoTracker()
        return open_tracker(
            self.job.execution.wandb,
            self.work.path,
            experiment=self.job.experiment,
            asset=self.job.asset,
            fingerprint=self.job.recipe_fingerprint,
            anew=not self.job.execution.resume,
            config=plain(self.recipe),
        )

    def loop(self, engine: Engine, log: MetricsLog | None, tracker: Tracker) -> None:
        """Step, log, measure and save until the recipe's last step or a request to stop."""
        steps, settings = self.recipe.steps, self.settings

        def emit(step: int, values: Mapping[str, Value]) -> None:
            if log is not None:
                log.write(step, values)
                tracker.log(step, values)

        if engine.iteration == 0:
            before = self.measure(engine)
            LOGGER.info("before the first step: held-out %.4f", before["heldout_loss"])
            emit(0, before)
            if self.drift_from == 0:
                self.save(engine)
        bar = tqdm(
            total=steps,
            initial=engine.iteration,
            unit="step",
            disable=not (self.layout.leads and sys.stderr.isatty()),
        )
        with bar:
            while engine.iteration < steps:
                if agree(bool(self.stop)):
                    self.save(engine)
                    raise Interrupted(
                        f"stopped by {self.stop.received or 'another rank'} at step {engine.iteration}; "
                        "start the same job again to go on"
                    )
                self.work.at("step", engine.iteration + 1)
                result = engine.step(per_layer_router_metrics=self.job.execution.per_layer_router_metrics)
                values: dict[str, Value] = dict(result.metrics)
                last = engine.iteration == steps
                if last or engine.iteration % settings.eval_interval == 0:
                    values.update(self.measure(engine))
                if last or engine.iteration % settings.log_interval == 0 or "heldout_loss" in values:
                    emit(engine.iteration, values)
                    self.report(result, values, bar)
                bar.update()
                due = engine.iteration % settings.save_interval == 0 or engine.iteration == self.drift_from
                if last or due:
                    self.save(engine)
        if self.saved != engine.iteration:
            self.save(engine)

    def report(self, result: StepResult, values: Mapping[str, Value], bar: Any) -> None:
        """One line for people: on the bar where there is one, in the log in any case."""
        text = (
            f"step {result.step}/{self.recipe.steps} loss {result.loss:.4f} gradient {result.grad_norm:.3g}"
        )
        if "heldout_loss" in values:
            text += f" held-out {values['heldout_loss']:.4f}"
        bar.set_postfix_str(text)
        LOGGER.info("%s %.0f tokens/s", text, result.tokens_per_second)

    def measure(self, engine: Engine) -> dict[str, Value]:
        """Held-out loss at the present step."""
        self.work.at("evaluate", engine.iteration)
        return dict(engine.held_out())

    def save(self, engine: Engine) -> None:
        """Save the present step, unless it is saved already."""
        if self.saved == engine.iteration:
            return
        self.work.at("save", engine.iteration)
        began = time.perf_counter()
        provenance = self.provenance.of(
            engine.iteration, saved_unix_s=time.time(), tokens=engine.progress.tokens
        )
        path = engine.save(self.checkpoints, provenance)
        self.saved = engine.iteration
        LOGGER.info("saved %s in %.1f s", path, time.perf_counter() - began)

    def publish(self, engine: Engine) -> list[str]:
        """Write the weights into `output_dir/payload`; returns the names of the files."""
        self.work.at("publish", engine.iteration)
        output = Path(self.job.output_dir)
        scratch, payload = output / WRITING_NAME, output / PAYLOAD_NAME

        def clear() -> None:
            for left in (scratch, payload):
                if left.exists():  # of an attempt that ended before its summary
                    shutil.rmtree(left)
            (output / SUMMARY_NAME).unlink(missing_ok=True)

        together(clear)
        files = save_published(engine.model, self.recipe.architecture, scratch)
        together(lambda: scratch.rename(payload))
        return files

    def summary(self, trained: Trained, drift: Drift | None) -> dict[str, Any]:
        """Return what the orchestrator records of the run.

        `heldout_loss_*` weighs the kinds of samples by their shares, `heldout` has each kind's own losses;
        `heldout_objective_*` is the training objective on the same samples, to be laid over `loss_*`.
        `router` is there only for a model that has routers.
        """
        progress = trained.progress
        start, end = progress["heldout"][0], progress["heldout"][-1]
        return {
            "command": self.job.command,
            "asset": self.job.asset,
            "experiment": self.job.experiment,
            "recipe_fingerprint": self.job.recipe_fingerprint,
            "config_sha256": self.config_hash,
            "steps": self.recipe.steps,
            "new_layers_only_steps": self.recipe.new_layers_only_steps,
            "tokens": progress["tokens"],
            "samples": progress["samples"],
            "loss_first": progress["loss_first"],
            "loss_last": progress["loss_last"],
            "heldout_loss_start": start["heldout_loss"],
            "heldout_loss_end": end["heldout_loss"],
            "heldout_objective_start": start["heldout_objective"],
            "heldout_objective_end": end["heldout_objective"],
            "heldout_tokens": end["heldout_tokens"],
            "heldout": describe_held_out(progress["heldout"], trained.mixture),
            "uniform_loss": math.log(self.recipe.architecture.vocab_size),
            "parameters": trained.parameters,
            "payload": trained.files,
            "checkpoints": [self.checkpoints.path(step).name for step in self.checkpoints.iterations()],
            "resumed_from": self.resumed_from,
            "resume_drift": None if drift is None else drift.max_abs_difference,
            "resume_check": None if drift is None else drift.describe(),
            "fill_ratio": self.data.fill_ratio(),
            **({"router": progress["router"]} if moe_layers(self.recipe.architecture) else {}),
            "layout": self.layout.describe(),
            "layouts": progress["layouts"],
            "device": self.layout.device.type,
            "peak_device_bytes": peak_device_bytes(self.layout.device),
            "train_seconds": progress["train_seconds"],
            "wall_seconds": round(time.time() - self.started, 3),
        }
