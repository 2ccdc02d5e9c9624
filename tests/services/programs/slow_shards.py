"""A worker of shards that takes its time, and an orchestrator of it that can be killed."""

import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe_assets.harmony.kd import KdWorker
from vpmoe_assets.resources.shards import ShardsResource


@dataclass(frozen=True)
class Slow:
    """The worker of `synth_kd_v1`; it waits a little for every batch, and notes who is at work."""

    worker: KdWorker
    seconds: float
    notes: Path

    def __call__(self, shard: int, report: Callable[[int], None]) -> Any:
        self.notes.mkdir(exist_ok=True)
        note = self.notes / f"{shard}.{os.getpid()}"
        note.touch()

        def slowly(rows: int) -> None:
            time.sleep(self.seconds)
            report(rows)

        return self.worker(shard, slowly)


def main() -> None:
    """Run shards on Ray: `python -m … PICKLE SHARDS SCRATCH NODE`."""
    worker = pickle.loads(Path(sys.argv[1]).read_bytes())
    shards = ShardsResource(engine="ray", engine_settings={"node_ip": sys.argv[4]})
    engine = shards.open(Path(sys.argv[3]), print)
    assert engine is not None
    engine(worker, int(sys.argv[2]))


if __name__ == "__main__":
    main()
