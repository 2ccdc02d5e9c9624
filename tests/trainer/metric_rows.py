"""What a run logged, as its readers find it."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, each a whole line of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
