"""SIGKILL at random moments of on-policy training: while it answers, scores, steps or saves.

A trial starts the trainer on a job of its own, waits until it has taken a step, kills it after a random part
of the time that the steps take undisturbed, once or twice, and lets it go on to its end. Weights and every
round of rollouts must be the bytes of the undisturbed run, so no prompt was used twice or lost.
"""

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

from tests.trainer.train.on_policy_jobs import on_policy_job, on_policy_recipe, write_harmony, write_teacher
from tests.trainer.train.train_jobs import ROOT, command, environment, run_job_process, write_job
from trainer.contract.schema.job import Job

STEPS = 16
PATIENCE_S = 300.0


def on_policy(directory: Path, trials: int, seed: int) -> int:
    """Run the trials; returns an exit code."""
    draw = random.Random(seed)
    data = write_harmony(directory / "data", rows=40)
    teacher = write_teacher(directory / "teacher")

    def job(name: str) -> Job:
        recipe = on_policy_recipe(steps=STEPS, **{"training.save_interval": 3, "rollouts.baseline": True})
        return on_policy_job(directory, data, teacher, recipe=recipe, name=name)

    whole = job("whole")
    process = _start(whole)
    begun = _first_step(whole, process)
    assert process.wait(PATIENCE_S) == 0, _log(whole)
    duration = time.monotonic() - begun
    wanted = _made(whole)
    print(f"stage3: steps take {duration:.1f} s undisturbed; seed {seed}; {directory}", flush=True)
    failed = 0
    for number in range(trials):
        trial = job(f"trial-{number}")
        moments = []
        for _ in range(draw.choice((1, 1, 2))):
            process = _start(trial)
            _first_step(trial, process)
            time.sleep(draw.uniform(0.0, duration))
            beat = json.loads((Path(trial.work_dir) / "heartbeat").read_text())
            process.kill()
            code = process.wait(PATIENCE_S)
            moments.append(f"{beat.get('phase')} {beat.get('iteration')}" if code == -9 else "had ended")
        done = run_job_process(trial, timeout=PATIENCE_S)
        found = _made(trial) if done.returncode == 0 else {}
        bad = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        failed += bool(bad)
        verdict = "same bytes" if not bad else f"{len(bad)} files differ: {bad[:3]}; exit {done.returncode}"
        print(f"{number}: killed at {', '.join(moments)}: {verdict}", flush=True)
        if not bad:
            shutil.rmtree(Path(trial.work_dir).parent)
    print(f"{trials - failed} of {trials} as they have to be: {len(wanted)} files each")
    return int(bool(failed))


def _start(job: Job) -> subprocess.Popen[bytes]:
    started = command(write_job(job))
    with (Path(job.work_dir).parent / "console.txt").open("ab") as console:
        return subprocess.Popen(started, env=environment(), cwd=ROOT, stdout=console, stderr=console)


def _first_step(job: Job, process: subprocess.Popen[bytes]) -> float:
    """Wait until this start has logged a step, or has ended; returns the moment."""
    metrics = Path(job.work_dir) / "metrics.jsonl"
    begun = time.time()
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        fresh = metrics.exists() and metrics.stat().st_mtime > begun
        if fresh and "rollouts/trained" in (metrics.read_text().splitlines() or [""])[-1]:
            return time.monotonic()
        time.sleep(0.05)
    return time.monotonic()


def _made(job: Job) -> dict[str, bytes]:
    found = {}
    for directory in (Path(job.output_dir) / "payload", Path(job.work_dir) / "rollouts"):
        found |= {f"{directory.name}/{path.name}": path.read_bytes() for path in directory.iterdir()}
    return found


def _log(job: Job) -> str:
    return (Path(job.work_dir).parent / "console.txt").read_text(errors="replace")[-4000:]
