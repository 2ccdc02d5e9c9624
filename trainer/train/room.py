"""Is there room for a run? Its plan of memory and disk against this machine, before anything is built."""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from trainer.contract.disk import DiskPlan, disk_plan
from trainer.contract.memory import Layout as Ranks
from trainer.contract.memory import MemoryPlan, memory_plan
from trainer.contract.safetensors_header import read_header
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.status import CHECKPOINTS_NAME, ROLLOUTS_NAME
from trainer.errors import NoRoomError
from trainer.job.distributed import Layout
from trainer.job.workdir import LOGGER
from trainer.train.inputs import TEACHER_INPUT

MARGIN = 0.02
"""A run is refused where its plan exceeds what is free by more than this: a plan is right to about 1 %, and
one that just fits is let try."""
MOST_RANKS = 64
"""Data-parallel ranks up to which a remedy is looked for."""

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        "total_inactive_file",
    ),
)


def require_room(job: Job, recipe: TrainRecipe, layout: Layout, *, verify_resume: bool = True) -> None:
    """Refuse a run that the devices or the disk cannot hold. Collective.

    Args:
        job: For its directories and its layout.
        recipe: The run.
        layout: Where this process stands.
        verify_resume: Whether the resume check will be made.

    Raises:
        NoRoomError: On every rank: what is needed, what is there, and what would help.
    """
    plan = _memory(recipe, Ranks(layout.dp, layout.tp, layout.ep), layout.device.type)
    free, teacher = free_memory(layout.device), teacher_memory(job, recipe)
    LOGGER.info("%s: %s planned at the peak of a step, %s free", layout.device, _gib(plan.total), _gib(free))
    if teacher:
        LOGGER.info("%s: %s of what is free for the teacher's weights", layout.device, _gib(teacher))
    problem = memory_problem(plan, free, recipe, str(layout.device), teacher=teacher)
    if problem is None and layout.leads:
        problem = disk_problem(job, recipe, verify_resume=verify_resume)
    problems: list[str | None] = [None] * layout.world
    dist.all_gather_object(problems, problem)
    if found := sorted({text for text in problems if text is not None}):
        raise NoRoomError("\n".join(found))


def free_memory(device: torch.device) -> int:
    """Return the bytes that this rank may take: of its GPU, or its share of the machine or container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    available = min(psutil.virtual_memory().available, *(_free_in_cgroup(*paths) for paths in _CGROUPS))
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def teacher_memory(job: Job, recipe: TrainRecipe) -> int:
    """Return the bytes of the weights of a teacher in the process of the student; 0 where it is served."""
    given = job.inputs.get(TEACHER_INPUT)
    if given is None or recipe.rollouts is None:
        return 0
    entries = [
        entry
        for file in Path(given.path).glob("*.safetensors")
        for entry in read_header(file).entries.values()
    ]
    # A byte of MXFP4 blocks is two numbers, which are unpacked as they are loaded.
    numbers = sum(math.prod(entry.shape) * (2 if entry.dtype == "U8" else 1) for entry in entries)
    return numbers * {"fp32": 4, "bf16": 2}[recipe.training.dtype]


def _free_in_cgroup(limit: Path, used: Path, reclaimable: str) -> int:
    """Bytes left under a container's limit; without a limit more than any machine has."""
    try:
        most = int(limit.read_text(encoding="ascii"))
        taken = int(used.read_text(encoding="ascii"))
        statistics = used.with_name("memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such cgroup, or "max"
        return 1 << 62
    cached = next((int(line.split()[1]) for line in statistics if line.split()[0] == reclaimable), 0)
    return most - taken + cached


def memory_problem(
    plan: MemoryPlan, free: int, recipe: TrainRecipe, device: str, *, teacher: int = 0
) -> str | None:
    """Say what is missing where a plan does not fit, and what would help; None where it fits.

    Args:
        plan: Of the run.
        free: Bytes that the rank may take.
        recipe: The run, for the remedies.
        device: Its name, such as `cuda:0`.
        teacher: Bytes of the teacher's weights, which lie beside.
    """
    if _fits(plan.total + teacher, free):
        return None
    free = max(0, free - teacher)
    parts = (
        ("weights", plan.weights),
        ("gradients", plan.gradients),
        ("optimizer", plan.state - plan.weights - plan.gradients),
        ("activations", plan.activations),
        ("work space", plan.work),
    )
    shares = ", ".join(f"{name} {_gib(amount)}" for name, amount in parts)
    remedies = [*_memory_remedies(plan, free, recipe, device), "use a device with more memory"]
    beside = ""
    if teacher:
        remedies.append("serve the teacher (sources.teacher.kind = 'server')")
        beside = f" beside the teacher's weights of {_gib(teacher)}"
    return (
        f"{device}: a training step needs {_gib(plan.total)} ({shares}) with {plan.layout}, and {_gib(free)} "
        f"are free{beside}. Remedies: {'; '.join(remedies)}"
    )


def _memory_remedies(plan: MemoryPlan, free: int, recipe: TrainRecipe, device: str) -> Iterator[str]:
    """Yield the changes that make the run fit, each with what it then needs.

    Those of the recipe come first; where they do not do alone, the others build on them.
    """
    kind, ranks, training = device.partition(":")[0], plan.layout, recipe.training
    helpful: list[tuple[str, dict[str, Any]]] = []
    if training.optimizer.name == "normuon" and training.optimizer.momentum_dtype == "fp32":
        optimizer = training.optimizer.model_copy(update={"momentum_dtype": "bf16"})
        helpful.append(('training.optimizer.momentum_dtype = "bf16"', {"optimizer": optimizer}))
    if training.micro_batch_size > 1:
        helpful.append(("training.micro_batch_size = 1", {"micro_batch_size": 1}))
    changed = recipe
    for text, update in helpful:
        alone = recipe.model_copy(update={"training": training.model_copy(update=update)})
        needed = _memory(alone, ranks, kind).total
        changed = changed.model_copy(update={"training": changed.training.model_copy(update=update)})
        if _fits(needed, free):
            yield f"{text} (needs {_gib(needed)})"
    together = " and ".join(text for text, _ in helpful)
    if len(helpful) > 1 and _fits(needed := _memory(changed, ranks, kind).total, free):
        yield f"{together} (need {_gib(needed)})"
    for base, text in ((recipe, ""), (changed, together))[: 1 + bool(helpful)]:
        for wider in _wider(ranks, recipe):
            needed = _memory(base, wider, kind).total
            if _fits(needed, free):
                rows = wider.dp * base.training.micro_batch_size
                changes = [text] * bool(text) + [f"execution.dp = {wider.dp}"]
                changes += [f"execution.ep = {wider.ep}"] * (wider.ep != ranks.ep)
                odd = training.global_batch_size % rows
                batches = f", with a training.global_batch_size that {rows} divides" if odd else ""
                yield f"{' and '.join(changes)}{batches} (needs {_gib(needed)})"
                break


def _wider(ranks: Ranks, recipe: TrainRecipe) -> Iterator[Ranks]:
    """Yield layouts of more data-parallel ranks, with the experts where they are and spread over all."""
    moe, dp = recipe.architecture.moe, ranks.dp
    while (dp := 2 * dp) <= MOST_RANKS:
        yield Ranks(dp, ranks.tp, ranks.ep)
        if moe is not None and moe.num_experts % dp == 0:
            yield Ranks(dp, ranks.tp, dp)


def disk_problem(job: Job, recipe: TrainRecipe, *, verify_resume: bool = True) -> str | None:
    """Say what is missing where checkpoints and weights do not fit, and what would help; None where they fit.

    What an earlier start of the same job left is taken for room: it is part of the plan.
    """
    work, output = Path(job.work_dir), Path(job.output_dir)
    plan = disk_plan(recipe, verify_resume=verify_resume)
    needs = [(work / CHECKPOINTS_NAME, plan.work_dir), (output, plan.weights)]
    if _disk_of(work) == _disk_of(output):
        needs = [(work / CHECKPOINTS_NAME, plan.total)]
        reused = [work / CHECKPOINTS_NAME, work / ROLLOUTS_NAME, output]
    else:
        reused = []
    for path, needed in needs:
        free = shutil.disk_usage(_existing(path)).free + sum(_size(old) for old in reused or _own(path))
        if not _fits(needed, free):
            return _disk_message(path, needed, free, plan, recipe, verify_resume=verify_resume)
    return None


def _disk_message(
    path: Path, needed: int, free: int, plan: DiskPlan, recipe: TrainRecipe, *, verify_resume: bool
) -> str:
    remedies = []
    spare = needed - plan.work_dir  # weights that go to the same disk
    for text, update, check in (
        ("training.keep_last = 1", {"keep_last": 1}, verify_resume),
        ("training.keep_every = 0", {"keep_every": 0}, verify_resume),
        (
            "training.keep_last = 1 and training.keep_every = 0",
            {"keep_last": 1, "keep_every": 0},
            verify_resume,
        ),
        ("--no-verify-resume", {}, False),
    ):
        training = recipe.training.model_copy(update=update)
        other = disk_plan(recipe.model_copy(update={"training": training}), verify_resume=check)
        if other.checkpoints < plan.checkpoints and _fits(other.work_dir + spare, free):
            remedies.append(f"{text} (needs {_gb(other.work_dir + spare)})")
    remedies.append("a work directory on another disk, or room made on this one")
    kept = f"rollouts {_gb(plan.rollouts)} at most; " if plan.rollouts else ""
    return (
        f"{path}: the run needs {_gb(needed)} there (at most {plan.checkpoints} resume checkpoints of "
        f"{_gb(plan.checkpoint)} at once; {kept}published weights {_gb(plan.weights)}) and {_gb(free)} are "
        f"free. Remedies: {'; '.join(remedies)}"
    )


def _memory(recipe: TrainRecipe, ranks: Ranks, device: str) -> MemoryPlan:
    return memory_plan(
        recipe.architecture,
        recipe.training,
        ranks,
        seq_len=recipe.seq_len,
        device="cuda" if device == "cuda" else "cpu",
    )


def _fits(needed: int, free: int) -> bool:
    return needed <= free * (1 + MARGIN)


def _own(path: Path) -> list[Path]:
    """Return what a run has in the place of a need: rollouts lie beside checkpoints."""
    return [path, path.with_name(ROLLOUTS_NAME)] if path.name == CHECKPOINTS_NAME else [path]


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _disk_of(path: Path) -> int:
    return _existing(path).stat().st_dev


def _size(root: Path) -> int:
    found: Sequence[Path] = [path for path in root.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e8 else f"{size / 1e6:.1f} MB"
