"""The jobs at work in a store, whoever started them and wherever they run, as their work areas tell."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract.status import RUNNING
from vpmoe_assets.lineage.layout import directories
from vpmoe_assets.resources.at_work import SILENT_S, Job, file_of, jobs
from vpmoe_assets.resources.detached import DetachedJob
from vpmoe_assets.resources.process_record import ProcessRecord
from vpmoe_assets.resources.ray.placed import placed
from vpmoe_assets.resources.shard_progress import shards_at_work
from vpmoe_assets.resources.slurm import batch
from vpmoe_assets.resources.worker_places import places
from vpmoe_assets.running.shares import alone, left_s, shares

State = Literal["running", "queued", "silent"]


@dataclass(frozen=True, kw_only=True)
class Working:
    """A job at work.

    Attributes:
        experiment: That it is for.
        asset: That it makes.
        state: `running`, `queued` (handed over, and not begun), or `silent`: no heartbeat for a minute.
        phase: What it is at, by its heartbeat.
        step: Last step that it logged; rows of data or conversations done, where shards are worked on.
        steps: That it takes in all; None where it takes none.
        loss: Of that step, in nats.
        tokens_per_second: Of that step.
        left_s: Seconds that the rest of its steps takes, at the pace of the last one.
        silent_s: Seconds since its last heartbeat, by this machine's clock; None without one.
        launcher: That started it; None where nothing on record says so.
        job_id: Of a job that was handed over.
        host: Machine that it runs on, or that it was started from.
        work_dir: Its directory.
    """

    experiment: str
    asset: str
    state: State
    phase: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    left_s: float | None = None
    silent_s: float | None = None
    launcher: str | None = None
    job_id: str | None = None
    host: str | None = None
    work_dir: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def working(root: Path, experiment: str | None = None) -> list[Working]:
    """Return the jobs at work, by experiment and asset.

    Args:
        root: Of the store.
        experiment: Name; None takes all.
    """
    found = []
    for name in directories(root / ".work"):
        if name.startswith(".") or experiment not in (None, name):
            continue
        told = {job.work: job for job in jobs(root, name)}
        for area in directories(root / ".work" / name):
            work = root / ".work" / name / area
            if not area.startswith(".") and (job := _working(name, work, told.get(work))) is not None:
                found.append(job)
    return sorted(found, key=lambda job: (job.experiment, job.asset))


def _working(experiment: str, work: Path, told: Job | None) -> Working | None:
    """Return the job of a work area, or None where none is at work."""
    record = next(_records(work), None)
    says = told is not None and told.state == RUNNING
    if record is None and not (says and told is not None and told.alive):
        return _shards(experiment, work) or _shares(experiment, work)
    detached = record if isinstance(record, DetachedJob) else None
    began = None if detached is None else batch.began(work)
    state: State = "queued" if detached is not None and began is None else "silent"
    if told is not None and told.alive:
        state = "running"
    last = {} if told is None else told.last
    job = file_of(work) if told is not None and told.alive else {}
    scores = alone(told) if told is not None and job.get("command") == "score" else None
    where = placed(work)
    return Working(
        experiment=experiment,
        asset=work.name.rpartition("-")[0] or work.name,
        state=state,
        phase="" if told is None else told.phase,
        step=_whole(last.get("step")),
        steps=None if told is None else told.steps,
        loss=_number(last.get("loss")),
        tokens_per_second=_number(last.get("tokens_per_second")) if scores is None else scores.tokens_per_s,
        left_s=None if told is None else told.left_s if scores is None else left_s(scores, job),
        silent_s=None if told is None else told.silent_s,
        launcher=None if record is None else _launcher(detached, where),
        job_id=None if detached is None else detached.job_id,
        host=(None if began is None else began.machine)
        or (where or {}).get("host")
        or (None if record is None else record.orchestrator.host),
        work_dir=str(work),
    )


def _launcher(detached: DetachedJob | None, where: dict[str, Any] | None) -> str:
    if detached is not None:
        return detached.launcher
    return "local" if where is None else "ray"


def _shards(experiment: str, work: Path) -> Working | None:
    """Return the shards that an orchestrator works on in a work area, or None where none does."""
    if (found := shards_at_work(work)) is None:
        return None
    return Working(
        experiment=experiment,
        asset=work.name.rpartition("-")[0] or work.name,
        state="running" if found.silent_s < SILENT_S else "silent",
        phase="rows",
        step=found.rows,
        steps=found.total,
        left_s=found.left_s,
        silent_s=found.silent_s,
        launcher=found.engine,
        host=found.orchestrator.host,
        work_dir=str(work),
    )


def _shares(experiment: str, work: Path) -> Working | None:
    """Return the processes that share a job of scores in a work area, or None where none is at work."""
    if (found := shares(work)) is None:
        return None
    record = next((record for place in places(work) for record in _records(place)), None)
    on_ray = any(placed(place) is not None for place in places(work))
    return Working(
        experiment=experiment,
        asset=work.name.rpartition("-")[0] or work.name,
        state="running",
        phase=f"{found.alive} of {found.of} workers",
        step=found.done,
        tokens_per_second=found.tokens_per_s,
        left_s=left_s(found, file_of(work)),
        silent_s=found.silent_s,
        launcher="ray" if on_ray else "local",
        host=None if record is None else record.orchestrator.host,
        work_dir=str(work),
    )


def _records(work: Path) -> Iterator[DetachedJob | ProcessRecord]:
    """Yield what is on record of who works there; what cannot be read is `vpmoe reap`'s business."""
    for kind in (DetachedJob, ProcessRecord):
        try:
            found = kind.read(work)
        except (ValueError, OSError):
            continue
        if found is not None:
            yield found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
