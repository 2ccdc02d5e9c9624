"""Where in a Ray cluster a job runs, as its driver notes it in the work directory."""

import json
from pathlib import Path
from typing import Any

PLACED_NAME = ".ray.json"
"""There from the job's start on a machine; without it, a job waits for one."""


def placed(work_dir: Path) -> dict[str, Any] | None:
    """Return machine (`host`), process (`pid`) and GPUs (`gpus`) of a job; None where it runs nowhere."""
    try:
        found = json.loads((work_dir / PLACED_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
