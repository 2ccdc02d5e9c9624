"""An evaluator without a model: reports that follow from the digests it is given.

`python -m stand_in_evaluation evaluate --job job.json`. What it writes has the shape of the trainer's;
`STAND_IN` (JSON) asks for faults.
  broken   checkpoints that cannot be measured
  die_at   checkpoint at which the process ends without a word
"""

import json
import os
import sys
from pathlib import Path

from trainer.contract.attempts import begin_attempt, end_attempt

job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text())
asked = json.loads(os.environ.get("STAND_IN", "{}"))
work, output = Path(job["work_dir"]), Path(job["output_dir"])
(work / "heartbeat").write_text("{}")
(work / "log.txt").write_text(f"measures {', '.join(job['recipe']['checkpoints'])}\n")
output.mkdir(parents=True, exist_ok=True)
failed = []
for name in job["recipe"]["checkpoints"]:
    if name == asked.get("die_at"):
        os._exit(9)
    part = job["parts"][name]
    own, place = Path(part["work_dir"]), Path(part["output_dir"])
    (place / "payload").mkdir(parents=True, exist_ok=True)
    begin_attempt(own / "attempts.jsonl")
    (own / "log.txt").write_text(f"measures {name} with {', '.join(job['recipe']['checkpoints'])}\n")
    if name in asked.get("broken", []):
        end_attempt(own / "attempts.jsonl", "failed: its weights are broken")
        failed.append(name)
        continue
    right = int(job["inputs"][name]["digest"][:4], 16) % 20
    report = {
        "schema_version": "vpmoe.eval/1",
        "checkpoint_id": name,
        "checkpoint_digest": job["inputs"][name]["digest"],
        "tokenizer_sha256": "0" * 64,
        "max_len": 512,
        "config": {
            "max_per_task": 20,
            "seed": 1,
            "few_shot_seed": 1,
            "bundle_digest": job["inputs"]["core8_bundle"]["digest"],
        },
        "results": {"piqa": right / 20},
        "centered_results": {"piqa": right / 10 - 1},
        "core8_centered_mean": right / 10 - 1,
        "counts": {"piqa": {"correct": right, "total": 20, "cropped": 0}},
        "stderr": {"tasks": {"piqa": 0.1}, "core8_centered_mean": 0.2},
        "metrics": {
            "core8/centered_mean": right / 10 - 1,
            "core8/centered_mean_stderr": 0.2,
            "core8/piqa/centered": right / 10 - 1,
            "ppl/text/nll": 3.0,
            "ppl/text/stderr": 0.1,
        },
        "refused": {},
    }
    items = [{"task": "piqa", "row": row, "correct": row < right, "prediction": 0} for row in range(20)]
    (place / "payload" / f"{name}.json").write_text(json.dumps(report))
    (place / "payload" / f"{name}.items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    envelope = {**report, "git_sha": job["provenance"]["git_sha"]}
    (place / f"{name}.json").write_text(json.dumps(envelope))
    end_attempt(own / "attempts.jsonl", "done")
    summary = {"seconds": {"core8": 0.1}, "execution": job["execution"], "gpus": []}
    (place / "summary.json").write_text(json.dumps(summary))
if failed:
    (work / "STATUS").write_text(f"failed: {', '.join(failed)}: its weights are broken\n")
    sys.exit(1)
(output / "summary.json").write_text("{}")
(work / "STATUS").write_text("done\n")
