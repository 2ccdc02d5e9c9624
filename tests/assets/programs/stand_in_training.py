"""A trainer without a model: does what an asset sees of one, and what `STAND_IN` (JSON) asks for.

`python -m stand_in_training train --job job.json`. It writes a checkpoint at every step and goes on from the
last; its weights, zeros, are a function of the job's recipe, seed and inputs.
  die_at     step at which it ends without a word
  summary    entries of the summary that are to be others
  logged     entries of every line of the metrics beside the usual ones
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from zero_weights import write_zero_rung

from trainer.contract.schema.architecture import Architecture

job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text())
asked = json.loads(os.environ.get("STAND_IN", "{}"))
work, output, steps = Path(job["work_dir"]), Path(job["output_dir"]), job["recipe"]["steps"]
done = max((int(path.name[5:]) for path in (work / "checkpoints").glob("iter_*")), default=0)


def status(text: str) -> None:
    (work / "STATUS").write_text(text + "\n")


status("running")
(work / "heartbeat").write_text("{}")
with (work / "log.txt").open("a") as log, (work / "metrics.jsonl").open("a") as metrics:
    log.write(f"starts after step {done}\n")
    log.flush()
    for step in range(done + 1, steps + 1):
        if step == asked.get("die_at"):
            os._exit(9)
        line = {"step": step, "loss": 12.0 - step / 10, "tokens_per_s": 100.0}
        if step % 5 == 0:
            line["heldout_loss"] = 11.5
        line |= asked.get("logged", {})
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        (work / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)
        (work / "checkpoints" / f"iter_{step:07d}" / "state").write_text(str(step))
identity = {
    "recipe": job["recipe"],
    "seed": job["seed"],
    "inputs": {name: given["digest"] for name, given in job["inputs"].items()},
}
payload = output / "payload"
payload.mkdir(parents=True, exist_ok=True)
digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
architecture = Architecture.model_validate_json(json.dumps(job["recipe"]["architecture"]))
write_zero_rung(payload, architecture, job["recipe"]["training"]["dtype"], note=digest)
summary = {
    "parameters": 1234,
    "loss_last": 12.0 - steps / 10,
    "heldout_loss_start": 12.2,
    "heldout_loss_end": 11.0,
    "uniform_loss": 12.211,
    "steps": steps,
    "tokens": {"reasoning": 9000, "final": 4000, "total": 20480},
    "fill_ratio": 0.9,
    "train_seconds": 1.5,
    "resume_drift": 0.0,
    "resume_check": {"state_equal": True, "from_step": steps - 2},
    "router": {"moe/router_agg/experts_active_mean": 7.5},
    "layout": {"dp": 1, "tp": 1, "ep": 1},
    **asked.get("summary", {}),
}
(output / "summary.json").write_text(json.dumps(summary))
status("done")
