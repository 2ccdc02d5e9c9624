"""An evaluator without a model: reports that follow from the digests it is given.

`python -m stand_in_evaluation evaluate --job job.json`. What it writes has the shape of the trainer's.
"""

import json
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text())
work, output = Path(job["work_dir"]), Path(job["output_dir"])
(work / "heartbeat").write_text("{}")
(work / "log.txt").write_text(f"measures {', '.join(job['recipe']['checkpoints'])}\n")
for directory in ("payload", "reports"):
    (output / directory).mkdir(parents=True, exist_ok=True)
known = {}
for name in job["inputs"]:
    if name.startswith("eval_"):
        of = name.removeprefix("eval_")
        known[of] = json.loads((Path(job["inputs"][name]["path"]) / f"{of}.json").read_text())
for name, checkpoint in job["recipe"]["checkpoints"].items():
    right = int(job["inputs"][name]["digest"][:4], 16) % 20
    before = checkpoint.get("compare_to")
    report = {
        "checkpoint_id": name,
        "checkpoint_digest": job["inputs"][name]["digest"],
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
        "delta": None
        if before is None
        else {
            "compared_to": before,
            "core8_centered_mean": right / 10 - 1 - known[before]["core8_centered_mean"],
            "tasks": {"piqa": {"acc": right / 20 - known[before]["results"]["piqa"]}},
        },
    }
    known[name] = report
    (output / "payload" / f"{name}.json").write_text(json.dumps(report))
    (output / "payload" / f"{name}.items.jsonl").write_text("{}\n")
    (output / "reports" / f"{name}.json").write_text(
        json.dumps({**report, "git_sha": job["provenance"]["git_sha"]})
    )
objects = {name: {"seconds": {"core8": 0.1}} for name in job["recipe"]["checkpoints"]}
(output / "summary.json").write_text(json.dumps({"objects": objects}))
(work / "STATUS").write_text("done\n")
