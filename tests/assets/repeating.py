"""An artifact made again from its record alone: its objects, its inputs, and an empty directory."""

import json
import os
import shutil
from pathlib import Path

from tests.forks import Forks
from vpmoe_assets.codebase.snapshot import lay_out
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store


def repeat(record: Record, objects: ObjectStore, inputs: Store, directory: Path, forks: Forks) -> Record:
    """Make an artifact again as its record says, and return the record of what came out.

    Args:
        record: Of the artifact. Nothing else is known of it: neither checkout nor experiment file.
        objects: Where the objects that it names are.
        inputs: Where the artifacts that it was made from are.
        directory: Empty; everything happens in it.
        forks: What runs the command.
    """
    assert list(directory.iterdir()) == []
    named, recorded = record.objects, record.environment["variables"]
    sources, experiment = directory / "sources", directory / "experiment.toml"
    lay_out(objects.get(named.sources), sources)
    experiment.write_bytes(objects.get(named.experiment))
    store = Store(directory / "artifacts")
    for reference in record.inputs:
        upstream = inputs.find(record.experiment, reference.asset, reference.version)
        assert upstream is not None
        assert upstream.record_digest == reference.record_digest
        shutil.copytree(inputs.directory(upstream), store.directory(upstream))
        for statement in inputs.statements.about(upstream):
            store.statements.append(statement)
    (directory / "home").mkdir()
    done = forks.run(
        [
            *("-m", "dagster", "asset", "materialize", "-m", "vpmoe_assets.definitions"),
            *("--select", f'key:"{record.experiment}/{record.asset}"'),
            *("--config-json", json.dumps(objects.get_json(named.run_config))),
        ],
        directory=directory,
        environment={
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("VPMOE_", "DAGSTER_"))
            },
            # Such as OMP_NUM_THREADS: with another number of threads sums round differently.
            **{name: value for name, value in recorded.items() if not name.startswith("VPMOE_")},
            "PYTHONPATH": str(sources),
            "DAGSTER_HOME": str(directory / "home"),
            "VPMOE_ARTIFACTS": str(store.root),
            "VPMOE_EXPERIMENT": str(experiment),
            "VPMOE_GIT_SHA": record.code.git_sha,
            "VPMOE_LEASE_DIR": str(directory / "leases"),
        },
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    again = store.find(record.experiment, record.asset)
    assert again is not None
    return again
