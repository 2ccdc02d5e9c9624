"""A store of the earlier schema, made by the commit that wrote it last, from git's own objects."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.assets.graphs import ROOT, SMALL
from tests.forks import Forks

COMMIT = "555799acd8c4960e261eb8a8d62de95a30e3eedf"
MADE = ("o200k_tokenizer", "synth", "synth_harmony")

_PROGRAM = """
import json, os, runpy, sys
import dagster as dg

definitions = runpy.run_module("vpmoe_assets.definitions")["defs"]
wanted = json.loads(sys.argv[1])
assets = [asset for asset in definitions.assets if {key.path[-1] for key in asset.keys} <= set(wanted)]
made = dg.materialize(assets, resources=definitions.resources, instance=dg.DagsterInstance.ephemeral())
assert made.success
"""


def make_earlier_store(directory: Path, forks: Forks) -> Path:
    """Let the code of the commit make a few small artifacts in a directory, and return the store."""
    checkout, store = directory / "checkout", directory / "artifacts"
    checkout.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", COMMIT], capture_output=True)
    if archive.returncode:
        pytest.skip(
            f"commit {COMMIT[:12]} is not at hand: a shallow clone? {archive.stderr.decode().strip()}"
        )
    (directory / "archive.tar").write_bytes(archive.stdout)
    with tarfile.open(directory / "archive.tar") as packed:
        packed.extractall(checkout, filter="data")
    text = (checkout / "configs" / "smoke.toml").read_text()
    for old, new in SMALL.items():
        assert text.count(old) <= 1, old  # what came later is not in it
        text = text.replace(old, new)
    (checkout / "tiny.toml").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = forks.run(
        ["-c", _PROGRAM, json.dumps(MADE)],
        environment={
            **environment,
            "PYTHONPATH": str(checkout),
            "VPMOE_EXPERIMENT": str(checkout / "tiny.toml"),
            "VPMOE_ARTIFACTS": str(store),
            # What is checked out lies in no repository of its own.
            "GIT_CEILING_DIRECTORIES": str(directory),
            "VPMOE_GIT_SHA": COMMIT,
            "VPMOE_GIT_DIRTY": "0",
        },
        directory=checkout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return store
