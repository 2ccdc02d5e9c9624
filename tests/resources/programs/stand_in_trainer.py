"""A trainer without a model: obeys the work-directory contract, and can be told to misbehave.

`python -m stand_in_trainer COMMAND --job job.json`. The recipe says what to do:
  steps, step_s    how many steps and how long one takes
  save_s           how long rank 0 writes a checkpoint; other ranks leave at once, as they may
  save_every       checkpoint every so many steps (0: only when asked to stop)
  fail_at, die_at  step at which to report failure (rank 0), or to end without a word (`die_rank`)
  hang_at          step from which rank 0 ignores every signal and its heart stops
  helper           start a helper in a session of its own that ignores every polite signal
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text())
recipe, work, output = job["recipe"], Path(job["work_dir"]), Path(job["output_dir"])
rank = int(os.environ.get("RANK", "0"))
leads = rank == 0
asked: list[int] = []
heart = threading.Event()


def replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{rank}.tmp")
    scratch.write_text(text)
    scratch.replace(path)


def status(text: str) -> None:
    if leads:
        replace(work / "STATUS", text + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    with (work / "log.txt").open("a") as log:
        log.write(text + "\n")


def beat() -> None:
    while not heart.wait(0.2):
        replace(work / "heartbeat", "")


def save(step: int) -> None:
    scratch = work / "checkpoints" / f".tmp_iter_{step:07d}"
    scratch.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + recipe.get("save_s", 0.0)
    with (scratch / "part").open("ab") as part:
        while time.monotonic() < end:
            part.write(b"x")
            part.flush()
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    (scratch / "complete").write_text(str(step))
    scratch.rename(work / "checkpoints" / f"iter_{step:07d}")
    say(f"saved step {step}")


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    if leads:
        threading.Thread(target=beat, daemon=True).start()
        status("running")
    if recipe.get("helper"):
        ignore = "import signal,time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", ignore], start_new_session=True)
    done = [int(path.name[5:]) for path in (work / "checkpoints").glob("iter_*")]
    start = max(done, default=0)
    say(f"rank {rank} starts after step {start}")
    metrics = (work / "metrics.jsonl").open("a") if leads else contextlib.nullcontext()
    with metrics:
        for step in range(start + 1, recipe.get("steps", 5) + 1):
            time.sleep(recipe.get("step_s", 0.0))
            if leads:
                record = {"step": step, "train/loss": 10.0 / step, "lr": 1e-3, "tokens_per_s": 100.0 + step}
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
            if step == recipe.get("fail_at") and leads:
                say("the loss of step 3 is NaN")
                status("failed: loss is NaN at step 3")
                return 1
            if step == recipe.get("die_at") and rank == recipe.get("die_rank", 0):
                raise RuntimeError("ended without a word")
            if step == recipe.get("hang_at") and leads:
                heart.set()
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                hang()
            if asked:
                if leads:
                    save(step)
                status("interrupted")
                return 75
            if recipe.get("save_every") and step % recipe["save_every"] == 0 and leads:
                save(step)
    if leads:
        (output / "payload").mkdir(parents=True, exist_ok=True)
        if not recipe.get("forget_payload"):
            (output / "payload" / "weights.bin").write_bytes(b"w" * 8)
        replace(
            output / "summary.json", json.dumps({"steps": recipe.get("steps", 5), "started_after": start})
        )
    status("done")
    return 0


def hang() -> None:
    while True:
        time.sleep(60)


sys.exit(main())
