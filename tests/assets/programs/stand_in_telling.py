"""The stand-in for training that says all it knows: environment and secrets in output, log and run files.

`STAND_IN` (JSON) may hold, beside what `stand_in_training` asks for, `error`: what it fails with.
"""

import json
import os
import runpy
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text())
asked = json.loads(os.environ.get("STAND_IN", "{}"))
work = Path(job["work_dir"])
told = json.dumps({**os.environ, "netrc": (Path.home() / ".netrc").read_text()})
print(told, flush=True)
(work / "log.txt").write_text(told + "\n" + "\n".join(os.environ.values()) + "\n")
(work / "wandb").mkdir(exist_ok=True)
(work / "wandb" / "debug.log").write_text(told)
(work / "wandb" / "run-1.wandb").write_bytes(b":W&B\0" + told.encode())
if error := asked.get("error"):
    print(error, file=sys.stderr)
    (work / "STATUS").write_text(f"failed: RuntimeError: {error}\n")
    sys.exit(1)
runpy.run_module("stand_in_training", run_name="__main__")
