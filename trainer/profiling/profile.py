"""The `profile` command: steps of a run, timed, then traced, and what the device is, as one report."""

import resource
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.provenance import config_hash
from trainer.contract.memory import Layout as Ranks
from trainer.contract.memory import memory_plan
from trainer.contract.schema.base import plain
from trainer.contract.schema.job import Job
from trainer.contract.schema.profile import ProfileRecipe
from trainer.contract.status import PAYLOAD_NAME
from trainer.errors import NoRoomError
from trainer.job.deliverable import WRITING_NAME, write_summary
from trainer.job.distributed import Layout, agree, session, together
from trainer.job.lifecycle import Interrupted
from trainer.job.metrics import MetricsLog
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir
from trainer.losses.common.objective import load_objective
from trainer.model.backend import load_backend
from trainer.model.gpt import build_model
from trainer.profiling import report
from trainer.profiling.kinds import told_apart
from trainer.profiling.measured import Measured
from trainer.profiling.mock import mock_data
from trainer.profiling.rates import measure_rates
from trainer.profiling.recorded import under_nsys
from trainer.profiling.timeline import Ranges, Timeline
from trainer.profiling.traced import Traced, trace
from trainer.train.captured import Body
from trainer.train.engine import Engine, StepResult
from trainer.train.room import free_memory, memory_problem

TRACES_NAME = ".traces"
"""Raw traces in the work directory: what begins with a dot is never published."""


def profile(job: Job, work: WorkDir, stop: StopRequest, *, keep_traces: bool = False) -> None:
    """Measure the training step that a job describes and deliver the report.

    Args:
        job: A `profile` job; it needs no input.
        work: Its work directory; raw traces stay there.
        stop: Asks for a clean stop; nothing is kept of what was measured by then.
        keep_traces: Write raw traces into the work directory.

    Raises:
        Interrupted: Stopped as asked.
        ConfigError: The recipe cannot run on this device.
        NoRoomError: The model does not fit.
        ProfileError: The profiler saw nothing of the GPU.
    """
    recipe, execution = job.profile_recipe(), job.execution
    load_backend(recipe.training.backend)
    load_objective(recipe.objective).refuse(recipe)
    began = time.time()
    with session(execution.device, tp=execution.tp, ep=execution.ep, dp=execution.dp) as layout:
        require_memory(recipe, layout)
        work.at("rates of the device", 0)
        rates = measure_rates(layout.device, Engine.dtype(recipe.training))
        traces = work.path / TRACES_NAME if keep_traces else None
        measured = measure(job, recipe, layout, work, stop, traces)
        if measured is None:
            LOGGER.info("the timed steps are recorded; their figures are taken without a recorder")
            return
        content = report.compose(recipe, layout, measured, rates)
        LOGGER.info("%s", report.sentence(content))
        together(lambda: deliver(job, recipe, content, began))


def require_memory(recipe: ProfileRecipe, layout: Layout) -> None:
    """Refuse a model that the device cannot hold.

    Raises:
        NoRoomError: What is needed, what is there, and what would help.
    """
    ranks = Ranks(layout.dp, layout.tp, layout.ep)
    plan = memory_plan(
        recipe.architecture,
        recipe.training,
        ranks,
        seq_len=recipe.seq_len,
        device="cuda" if layout.device.type == "cuda" else "cpu",
    )
    problem = memory_problem(plan, free_memory(layout.device), recipe, str(layout.device))
    if agree(problem is not None):
        raise NoRoomError(problem or "another rank has no room for the model; its log says why")


def build_engine(recipe: ProfileRecipe, layout: Layout, seed: int) -> Engine:
    """Return an engine at step 0, with weights of the seed and mock conversations."""
    settings = recipe.training
    model = build_model(
        recipe.architecture,
        dtype=Engine.dtype(settings),
        device=layout.device.type,
        seed=seed,
        backend=settings.backend,
    )
    data = mock_data(recipe.seq_len, recipe.architecture.vocab_size, seed)
    config = config_hash(plain(recipe), seed)
    return Engine(model, recipe, data, layout, seed=seed, config_hash=config)


def measure(
    job: Job,
    recipe: ProfileRecipe,
    layout: Layout,
    work: WorkDir,
    stop: StopRequest,
    traces: Path | None = None,
) -> Measured | None:
    """Warm up, time steps, then trace one of them and, where steps have graphs, one without.

    Collective. Under Nsight Systems it ends after the timed steps, and returns None.

    Raises:
        Interrupted: Stopped as asked.
        ProfileError: The profiler saw nothing of the GPU.
    """
    device, cuda = layout.device, layout.device.type == "cuda"
    work.at("build", 0)
    began = time.perf_counter()
    engine = build_engine(recipe, layout, job.seed)
    timeline = Timeline(device)
    engine.marked_by(timeline.mark)

    def step() -> StepResult:
        if agree(bool(stop)):
            raise Interrupted("stopped; start the same job again, and it measures from the beginning")
        work.at("step", engine.iteration + 1)
        return engine.step()

    step()
    _wait(device)
    set_up_s = time.perf_counter() - began
    for _ in range(recipe.warm_up_steps - 1):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        if under_nsys():
            torch.cuda.profiler.start()  # nsys waits for it
    log = MetricsLog(work.metrics) if layout.leads else None
    times, totals, results = [], dict[str, float](), []
    for _ in range(recipe.timed_steps):
        parts: dict[str, float] = {}
        with timeline.step(parts):
            results.append(step())
        times.append(sum(parts.values()))
        for part, ms in parts.items():
            totals[part] = totals.get(part, 0.0) + ms / recipe.timed_steps
        if log is not None:
            figures = {f"ms/{part}": round(ms, 4) for part, ms in parts.items()}
            log.write(engine.iteration, {**results[-1].metrics, "step_ms": times[-1], **figures})
    if log is not None:
        log.close()
    if under_nsys():
        if cuda:
            torch.cuda.profiler.stop()
        engine.close()
        return None
    if cuda:
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        peak, held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    graphs = engine.body.captured
    traced = traced_step(engine, device, traces and traces / f"step.rank_{layout.rank}.json")
    layers = traced
    if graphs:
        engine.body.release()
        engine.body = Body(engine.model, several=True, capture=False)
        step()  # what only passes without a graph compile or allocate is no part of the next one
        layers = traced_step(engine, device, traces and traces / f"without_graphs.rank_{layout.rank}.json")
    engine.close()
    return Measured(set_up_s, times, totals, results, peak, held, graphs, traced, layers)


def traced_step(engine: Engine, device: torch.device, path: Path | None) -> Traced:
    """Run one step under torch's profiler, its parts and kinds of layers told apart."""
    ranges = Ranges()
    engine.marked_by(ranges.mark)
    captured = engine.body.captured

    def step() -> None:
        # The forward pass of a graph runs no module.
        with nullcontext() if captured else told_apart(engine.model):
            engine.step()
        ranges.close()

    return trace(step, device, path)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def deliver(job: Job, recipe: ProfileRecipe, content: Mapping[str, Any], began: float) -> None:
    """Write payload, the report of this run with commit and time beside it, and the summary, last."""
    output = Path(job.output_dir)
    scratch, payload = output / WRITING_NAME, output / PAYLOAD_NAME
    for left in (scratch, payload):
        if left.exists():  # of an attempt that ended before its summary
            shutil.rmtree(left)
    scratch.mkdir(parents=True)
    report.write(content, scratch / report.NAME)
    scratch.rename(payload)
    report.write(report.enveloped(content, job, recipe), output / report.ENVELOPED_NAME)
    write_summary(
        output,
        {
            "command": job.command,
            "asset": job.asset,
            "experiment": job.experiment,
            "recipe_fingerprint": job.recipe_fingerprint,
            "device": content["device"],
            "layout": {key: content[key] for key in ("dp", "tp", "ep", "pp")},
            "payload": [report.NAME],
            "wall_seconds": round(time.time() - began, 3),
        },
    )
