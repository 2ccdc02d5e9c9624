"""A job's output directory: the payload, renamed into place when it is whole, and the summary, last."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.canonical import canonical_json
from trainer.contract.files import replace_text
from trainer.contract.status import MODULES_NAME, PAYLOAD_NAME, SUMMARY_NAME

SUMMARY_SCHEMA = "vpmoe.summary/1"
WRITING_NAME = f".{PAYLOAD_NAME}.writing"
"""Where the payload grows."""


def write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`: with it the deliverable is complete.

    Before it comes `modules.json`, what this process has really loaded of the trainer: evidence beside the
    code that the fingerprint says the work consists of.

    Args:
        output: The job's output directory.
        summary: JSON values; the schema is added.
    """
    package = __name__.partition(".")[0]
    modules = sorted(name for name in list(sys.modules) if name.partition(".")[0] == package)
    replace_text(output / MODULES_NAME, canonical_json(modules, indent=1) + "\n")
    text = canonical_json({"schema": SUMMARY_SCHEMA, **summary}, indent=1) + "\n"
    replace_text(output / SUMMARY_NAME, text)
