"""A trainer that converts nothing: `python -m stand_in_conversion convert --job job.json`.

Its checkpoint, of zeros, is a function of the job's recipe and inputs; `STAND_IN` (JSON) may give entries of
the summary.
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
work, output = Path(job["work_dir"]), Path(job["output_dir"])
(work / "heartbeat").write_text("{}")
(work / "log.txt").write_text(f"{sys.argv[1]} {job['recipe']['step']}\n")
payload = output / "payload"
payload.mkdir(parents=True, exist_ok=True)
identity = {
    "recipe": job["recipe"],
    "inputs": {name: given["digest"] for name, given in job["inputs"].items()},
}
digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
architecture = Architecture.model_validate_json(json.dumps(job["recipe"]["architecture"]))
write_zero_rung(payload, architecture, job["recipe"]["dtype"], note=digest)
passed = {"passed": True, "description": "as it should be", "metadata": {"measured": 0.25}}
summary = {
    "parameters": 4321,
    "wall_seconds": 2.5,
    "peak_rss_bytes": 10**9,
    "checks": {"reload": passed, "logits_bit_identical": passed, "router_entropy": passed},
    "layers": [
        {"layer": n, "kind": "local", "parent_layer": n, "residual_change": n / 10} for n in (1, 2, 3)
    ],
    "transform": {"zeroed": ["linear_proj"]},
    "details": {"calibration": {"tokens": 5}},
    "provenance": {
        "object_id": job["asset"],
        "transform": {"zeroed": ["linear_proj"]},
        "student_spec": {"num_layers": 16, "hidden_size": 64, "vocab_size": 201088},
        "parent_provenance_sha256": "0" * 64,
    },
    **asked.get("summary", {}),
}
for name in asked.get("failed", []):
    summary["checks"][name] = {"passed": False, "description": f"{name} is not so", "metadata": {}}
for name in asked.get("unmeasured", []):
    del summary["checks"][name]
(output / "summary.json").write_text(json.dumps(summary))
(work / "STATUS").write_text("done\n")
