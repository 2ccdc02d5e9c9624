"""How jobs are handed to Slurm: the table `[launcher.slurm]`. None of it is part of what a job makes."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.schema.base import Count, Frozen, PositiveFloat, PositiveInt

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_OURS = (
    *(
        "--job-name",
        "-J",
        "--output",
        "-o",
        "--error",
        "-e",
        "--open-mode",
        "--nodes",
        "-N",
        "--ntasks",
        "-n",
    ),
    *("--ntasks-per-node", "--chdir", "-D", "--export", "--signal", "--requeue", "--no-requeue", "--array"),
    *("-a", "--wait", "-W", "--parsable", "--wrap", "--gres", "--gpus", "--gpus-per-node"),
)
_KEYS = {"partition": ("-p",), "account": ("-A",), "qos": ("-q",), "time": ("-t",), "memory": ("--mem",)}
_Word = Annotated[str, Field(pattern=r"^[^\s-][^\s]*$")]


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job are spread.

    Attributes:
        nodes: Machines.
        ranks_per_node: Ranks on each of them.
    """

    nodes: int
    ranks_per_node: int


class SlurmSettings(Frozen):
    """The table `[launcher.slurm]`.

    Attributes:
        partition: Where jobs go; None leaves it to the cluster, as with the next three.
        account: Who pays.
        qos: Quality of service.
        time: Limit of one start, as Slurm writes it: "30" (minutes), "12:00:00", "2-00". A job that
            reaches it goes on from its checkpoint, `restarts` times.
        memory: Memory of each node, as `--mem` takes it.
        nodes: Machines of a job of several ranks; None takes as few as its ranks fit on. A job of one rank
            has one.
        gpus_per_node: GPUs of a machine: no more ranks are put on one, when a job runs on CUDA.
        gres: What Slurm calls them: "gpu", or a kind, such as "gpu:h100".
        cpus_per_rank: Cores of each rank; None leaves it to the cluster.
        directives: Further options of `sbatch`, such as "--exclusive" or "--constraint=ib".
        restarts: How often a job is started again after a lost node, a preemption or its time limit.
        notice_s: How long before its time limit a job is told to write a checkpoint, in seconds. It must be
            longer than a step and a checkpoint take.
        poll_s: Time between two questions to the cluster, in seconds; files are looked at more often.
        on_restart: What happens to a job that a killed orchestrator left in the cluster, when it is asked for
            again: `reattach` follows it, `cancel` ends it (with a checkpoint) and starts it anew, `refuse`
            leaves it alone and says so.
    """

    partition: _Word | None = None
    account: _Word | None = None
    qos: _Word | None = None
    time: _Word | None = None
    memory: _Word | None = None
    nodes: PositiveInt | None = None
    gpus_per_node: PositiveInt = 8
    gres: _Word = "gpu"
    cpus_per_rank: PositiveInt | None = None
    directives: Annotated[tuple[str, ...], Field(strict=False)] = ()
    restarts: Count = 3
    notice_s: Annotated[int, Field(gt=0, le=65535)] = 120
    poll_s: PositiveFloat = 10.0
    on_restart: Literal["reattach", "cancel", "refuse"] = "reattach"

    @model_validator(mode="after")
    def _check(self) -> Self:
        for given in self.directives:
            if not given.startswith("-") or "\n" in given:
                raise ValueError(f'directives: {given!r} is no option of sbatch, such as "--exclusive"')
            option = re.split(r"[=\s]", given, maxsplit=1)[0]
            if option in _OURS:
                raise ValueError(f"directives: {option} is decided by the launcher; remove it")
            for key, short in _KEYS.items():
                if option in (f"--{key}", *short):
                    raise ValueError(f"directives: {option} has a key of its own, {key}; use that")
        if self.time is not None and seconds(self.time) < 3 * self.notice_s:
            raise ValueError(
                f'time = "{self.time}" is less than three times notice_s = {self.notice_s}: a job would be '
                "told to stop soon after it began. Give it more time, or less notice"
            )
        return self

    def layout(self, nproc: int, device: str) -> Layout:
        """Return how many ranks run on how many machines.

        Args:
            nproc: Ranks.
            device: `cuda` limits the ranks of a machine to its GPUs.

        Raises:
            ValueError: They cannot be spread evenly, or do not fit.
        """
        if self.nodes is not None:
            nodes = min(self.nodes, nproc)
        else:
            nodes = -(-nproc // self.gpus_per_node) if device == "cuda" else 1
        if nproc % nodes:
            raise ValueError(
                f"nproc = {nproc} ranks cannot be spread evenly over {nodes} nodes; choose nproc or "
                "[launcher.slurm] nodes so that one divides the other"
            )
        if device == "cuda" and nproc // nodes > self.gpus_per_node:
            raise ValueError(
                f"nproc = {nproc} on {nodes} nodes is {nproc // nodes} ranks each, and [launcher.slurm] "
                f"gpus_per_node = {self.gpus_per_node}; raise nodes"
            )
        return Layout(nodes, nproc // nodes)


def seconds(limit: str) -> int:
    """Return a time limit of Slurm's in seconds.

    Args:
        limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on (`man sbatch`, --time).

    Raises:
        ValueError: It is none.
    """
    if (found := _TIME.fullmatch(limit)) is None:
        raise ValueError(f'time = "{limit}" is no time limit of Slurm; examples: "30", "12:00:00", "2-00"')
    days, *parts = (None if part is None else int(part) for part in found.groups())
    given = [part for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, rest = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, minutes, rest = given
    else:  # minutes[:seconds]
        hours, minutes, rest = 0, *[*given, 0][:2]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
