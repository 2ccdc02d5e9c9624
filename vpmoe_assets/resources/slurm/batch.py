"""The job script: what Slurm is asked for, and what happens on the first machine of a job.

The script's truth is files, in `.slurm/` of the work directory, on a file system that all machines share:

```
batch.sh    the script
started     job id, number of the restart, machine: written when it begins
stop        written by whoever wants it to end for good: it is not queued again then
exit        job id, number of the restart, exit code: written last
devices.N   names of the GPUs of machine N
```

A job that was interrupted without `stop` (its time is up, it is being preempted), or that lost a machine,
queues itself again, so nobody has to watch it; the trainer goes on from its last checkpoint.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.status import CONSOLE_NAME, INTERRUPTED, STATUS_NAME
from vpmoe_assets.resources.launcher import Launch
from vpmoe_assets.resources.slurm import node
from vpmoe_assets.resources.slurm.settings import Layout, SlurmSettings

PLACE = ".slurm"
SCRIPT, STARTED, STOP, EXIT = "batch.sh", "started", "stop", "exit"

_BODY = """\
work={work}
own="$work/{place}"
restart=${{SLURM_RESTART_COUNT:-0}}
say() {{ printf '%s\\n' "$2" > "$own/.$1.tmp" && mv "$own/.$1.tmp" "$own/$1"; }}
# A signal is for the ranks; this script outlives them, to say what became of them.
trap : INT TERM USR1 USR2
rm -f "$own/{exit}" "$work/{status}"
say {started} "$SLURM_JOB_ID $restart $(uname -n)"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$({python} -I -S -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
{step} {program} --first "$address" --port "$port" {rest}
code=$?
again=
# One that somebody cancelled, or that the cluster has queued again already, has no more to say.
state=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* JobState=\\([A-Z_]*\\).*/\\1/p')
[ "${{state:-RUNNING}}" = RUNNING ] || exit "$code"
if [ ! -e "$own/{stop}" ] && [ "$restart" -lt {restarts} ]; then
  if [ "$(cat "$work/{status}" 2>/dev/null)" = {interrupted} ]; then
    again='it was told to stop, and nobody wants it to end'
  elif [ "$code" -ne 0 ] && ! timeout 60 {probe} true; then
    again='one of its machines no longer answers'
  fi
fi
if [ -n "$again" ]; then
  echo "job $SLURM_JOB_ID of Slurm: $again; it is queued again"
  scontrol requeue "$SLURM_JOB_ID" && exit 0  # nothing is said of this start
fi
say {exit} "$SLURM_JOB_ID $restart $code"
exit "$code"
"""


@dataclass(frozen=True)
class Began:
    """A start of a job whose script has begun.

    Attributes:
        job_id: Of it.
        restart: How often it had been started again.
        machine: Where the script runs.
    """

    job_id: str
    restart: int
    machine: str


@dataclass(frozen=True)
class Ended:
    """What a job said last.

    Attributes:
        job_id: Of it.
        restart: How often it had been started again.
        code: Its exit code.
    """

    job_id: str
    restart: int
    code: int


def ended(work_dir: Path) -> Ended | None:
    """Return what the job in a work directory said last, or None where it has said nothing, or not all."""
    try:
        words = (work_dir / PLACE / EXIT).read_text(encoding="utf-8").split()
        return Ended(words[0], int(words[1]), int(words[2]))
    except (FileNotFoundError, IndexError, ValueError):
        return None


def began(work_dir: Path) -> Began | None:
    """Return what began in a work directory last, or None where nothing has, or not all is told."""
    try:
        words = (work_dir / PLACE / STARTED).read_text(encoding="utf-8").split()
        return Began(words[0], int(words[1]), words[2])
    except (FileNotFoundError, IndexError, ValueError):
        return None


def devices(work_dir: Path) -> tuple[str, ...]:
    """Return the names of the GPUs that a job has noted, machine by machine."""
    files = (work_dir / PLACE).glob(f"{node.DEVICES}.*")
    numbered = sorted(files, key=lambda path: int(path.suffix[1:]))
    return tuple(name for path in numbered for name in path.read_text(encoding="utf-8").splitlines())


def write(launch: Launch, name: str, settings: SlurmSettings, layout: Layout, restarts: int) -> Path:
    """Write the script of a job, and forget what an earlier one said.

    Args:
        launch: The start.
        name: Of the job.
        settings: What Slurm is asked for.
        layout: Of its ranks.
        restarts: How often it may queue itself again.

    Returns:
        The script.
    """
    place = launch.work_dir / PLACE
    place.mkdir(exist_ok=True)
    for old in (STARTED, STOP, EXIT, *(path.name for path in place.glob(f"{node.DEVICES}.*"))):
        (place / old).unlink(missing_ok=True)
    path = place / SCRIPT
    path.write_text(script(launch, name, settings, layout, restarts), encoding="utf-8")
    path.chmod(0o700)
    return path


def script(launch: Launch, name: str, settings: SlurmSettings, layout: Layout, restarts: int) -> str:
    """Return the text of the script; see `write`."""
    program = launch.sources.joinpath(*node.__name__.split(".")).with_suffix(".py")
    patience = int(launch.grace_s) + 30
    cores = None if settings.cpus_per_rank is None else settings.cpus_per_rank * layout.ranks_per_node
    sized = [f"--nodes={layout.nodes}", f"--ntasks={layout.nodes}", "--ntasks-per-node=1"]
    if cores is not None:
        sized.append(f"--cpus-per-task={cores}")
    body = _BODY.format(
        work=shlex.quote(str(launch.work_dir)),
        place=PLACE,
        started=STARTED,
        stop=STOP,
        exit=EXIT,
        status=STATUS_NAME,
        interrupted=INTERRUPTED,
        python=shlex.quote(sys.executable),
        restarts=restarts,
        # The rest of a job that lost a part is waited for as long as a checkpoint takes.
        step=shlex.join(["srun", *sized, "--mpi=none", f"--wait={patience}", "--kill-on-bad-exit=0"]),
        probe=shlex.join(["srun", "--overlap", "--quiet", *sized, "--mpi=none"]),
        program=shlex.join([sys.executable, "-I", "-S", str(program)]),
        rest=shlex.join(
            [
                *("--ranks", str(layout.ranks_per_node), "--patience", str(patience)),
                *("--place", str(launch.work_dir / PLACE)),
                *(["--cuda"] if launch.device == "cuda" else []),
                "--",
                *launch.trainer,
            ]
        ),
    )
    asked = "".join(f"#SBATCH {option}\n" for option in _options(launch, name, settings, layout, sized))
    return f"#!/bin/bash\n{asked}\n{body}"


def _options(
    launch: Launch, name: str, settings: SlurmSettings, layout: Layout, sized: list[str]
) -> list[str]:
    console = str(launch.work_dir / CONSOLE_NAME).replace("%", "%%")
    asked = [
        *(f"--job-name={name}", f"--output={_word(console)}", "--open-mode=append"),
        *(f"--chdir={_word(str(launch.sources))}", "--export=ALL", "--requeue"),
        *(f"--signal=INT@{settings.notice_s}", *sized),
    ]
    if launch.device == "cuda":
        asked.append(f"--gres={settings.gres}:{layout.ranks_per_node}")
    keys = {"partition": "partition", "account": "account", "qos": "qos", "time": "time", "memory": "mem"}
    for key, option in keys.items():
        if (value := getattr(settings, key)) is not None:
            asked.append(f"--{option}={_word(value)}")
    return [*asked, *settings.directives]


def _word(text: str) -> str:
    """Quote a value for a line of options, which Slurm splits at blanks."""
    return f'"{text}"' if any(mark in text for mark in " \t'") else text
