"""Runs one machine's ranks of a job: `python -I -S node.py --ranks N --first ADDRESS … -- COMMAND …`.

`srun` starts it once on each machine, and it becomes what it starts, so that a signal of Slurm's reaches it.
A single rank is the command itself. Several are started by torchrun, which they are bound to; the machines
meet at the first one's address. Only the standard library, a few milliseconds.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

DEVICES = "devices"


def main(arguments: list[str]) -> None:
    """Become the ranks of this machine.

    Args:
        arguments: Options, `--`, and the command line of one rank.

    Raises:
        SystemExit: The machine's own address or its GPUs cannot be found out.
        OSError: What is to be started cannot be run.
    """
    split = arguments.index("--")
    parser = argparse.ArgumentParser(prog="node")
    parser.add_argument("--ranks", type=int, required=True, help="on this machine")
    parser.add_argument("--first", required=True, help="address of the first machine")
    parser.add_argument("--port", type=int, required=True, help="of the rendezvous, on the first machine")
    parser.add_argument("--patience", type=int, required=True, help="seconds for ranks that are to end")
    parser.add_argument("--place", type=Path, required=True, help="directory for what is noted")
    parser.add_argument("--cuda", action="store_true", help="note the names of the GPUs")
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    number, machines = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    if options.cuda:
        (options.place / f"{DEVICES}.{number}").write_text(_gpus(), encoding="utf-8")
    if machines * options.ranks == 1:
        os.execv(command[0], command)
    own = _address(os.environ["SLURMD_NODENAME"])
    line = [
        *(sys.executable, "-m", "vpmoe_assets.resources.torchrun"),
        *("--shutdown-timeout", str(options.patience), "--"),
        *(f"--nnodes={machines}", f"--nproc-per-node={options.ranks}", "--max-restarts=0"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={options.first}:{options.port}", f"--local-addr={own}"),
        # Said, not guessed from names: two machines of one host would both take themselves for the first.
        f"--rdzv-conf=is_host={int(number == 0)}",
        *(f"--rdzv-id={os.environ['SLURM_JOB_ID']}", "--no-python"),
        *_bound("SIGTERM"),
        *command,
    ]
    os.execv(line[0], line)


def _bound(signal: str) -> list[str]:
    program = Path(__file__).resolve().parent.parent / "bound.py"
    return [sys.executable, "-I", "-S", str(program), signal]


def _address(name: str) -> str:
    """Return the address by which the cluster, and so every other machine, reaches this one."""
    asked = ["scontrol", "show", "node", "-o", name]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    if found is None:
        sys.exit(f"{' '.join(asked)} names no address of this machine: {done.stderr or done.stdout}")
    return found.group(1)


def _gpus() -> str:
    """Return the product names of the GPUs that Slurm gave to the job here, a line each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if visible:
        asked.append(f"--id={visible}")
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(
            f'{os.uname().nodename}: device = "cuda" was asked for, and the GPUs cannot be read: {error}'
        )
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
