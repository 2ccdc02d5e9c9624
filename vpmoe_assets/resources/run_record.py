"""Which process executes a Dagster run, written down for the case that it is killed.

Dagster's records do not tell: a run whose process was killed stays STARTED for ever and keeps its pool slot,
and every later step that needs the slot waits. So each run leaves a small file under the store while its
process lives, from before its first step. The file is taken away when that process ends, or by whoever closed
the run.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Self

from trainer.contract.files import replace_text
from vpmoe_assets.resources.instances import InstanceIdentity
from vpmoe_assets.resources.process_record import Orchestrator

if TYPE_CHECKING:
    from dagster import DagsterInstance

SCHEMA = "vpmoe.run/1"


@dataclass(frozen=True)
class RunRecord:
    """`artifacts/.work/.runs/<run id>.json`.

    Attributes:
        run_id: Of the Dagster run.
        orchestrator: The process that executes it.
        instance: Where Dagster keeps it.
        started_unix_s: When.
    """

    run_id: str
    orchestrator: Orchestrator
    instance: InstanceIdentity
    started_unix_s: float = field(default_factory=time.time)

    def write(self, path: Path) -> None:
        """Put the record into a file; a reader sees all of it or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record in a file.

        Raises:
            ValueError: The file is not such a record.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError(f"it is not a {SCHEMA} record")
            return cls(
                **{
                    **content,
                    "orchestrator": Orchestrator(**content["orchestrator"]),
                    "instance": InstanceIdentity(**content["instance"]),
                }
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: {error}. Look at it, close the run that it names, and remove it"
            ) from error


def path_of(store_root: Path, run_id: str) -> Path:
    """Return where the record of a run lies under a store."""
    return store_root / ".work" / ".runs" / f"{run_id}.json"


def paths(store_root: Path) -> Iterator[Path]:
    """Yield the records under a store."""
    yield from sorted(path_of(store_root, "x").parent.glob("*.json"))


def record_run(store_root: Path, instance: "DagsterInstance", run_id: str) -> None:
    """Write down that this process executes a run, until it ends.

    A run of an instance in memory dies with its process and is not recorded.
    """
    identity = InstanceIdentity.of(instance)
    if identity is None:
        return
    path = path_of(store_root, run_id)
    RunRecord(run_id, Orchestrator.this(), identity).write(path)
    # Not `atexit`, which a child of `multiprocessing` skips; Dagster's code server executes runs in such.
    Finalize(None, path.unlink, kwargs={"missing_ok": True}, exitpriority=0)
