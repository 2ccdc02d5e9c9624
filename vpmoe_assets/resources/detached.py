"""A job that outlives its orchestrator, written down in its work directory: `.detached.json`."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from trainer.contract.files import replace_text
from trainer.contract.json_text import parse_json
from vpmoe_assets.resources.process_record import Orchestrator

RECORD_NAME = ".detached.json"
SCHEMA = "vpmoe.detached/1"


@dataclass(frozen=True, kw_only=True)
class DetachedJob:
    """What whoever comes next has to know of it.

    Attributes:
        launcher: That handed it over; it alone can tell what became of it.
        name: Of the job there, unlike any other's.
        job_id: Of the job there; None from before it is handed over until its id is known.
        asset: Asset that is being made.
        nproc: Ranks.
        nodes: Machines.
        device: `cpu` or `cuda`.
        orchestrator: Who handed it over.
        dagster_run_id: For which Dagster run, or None.
        restarts: How often it was handed over again, since something took it away.
        submitted_unix_s: When.
    """

    launcher: str
    name: str
    job_id: str | None
    asset: str
    nproc: int
    nodes: int
    device: str
    orchestrator: Orchestrator
    dagster_run_id: str | None
    restarts: int = 0
    submitted_unix_s: float = field(default_factory=time.time)

    def write(self, work_dir: Path) -> None:
        """Put the record into the work directory; a reader sees all of it or none."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"
        replace_text(work_dir / RECORD_NAME, text)

    @classmethod
    def read(cls, work_dir: Path) -> Self | None:
        """Return the record of a work directory, or None where no such job works.

        Raises:
            ValueError: The file is not such a record.
        """
        path = work_dir / RECORD_NAME
        try:
            content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
            if content.pop("schema", None) != SCHEMA:
                raise ValueError(f"it is not a {SCHEMA} record")
            return cls(**{**content, "orchestrator": Orchestrator(**content["orchestrator"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: {error}. Look at it, end the job that it names by hand, and remove it."
            ) from error

    @staticmethod
    def remove(work_dir: Path) -> None:
        """Take the record away: the job has ended."""
        (work_dir / RECORD_NAME).unlink(missing_ok=True)
