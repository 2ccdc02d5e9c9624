"""A small store as people would have it: two stage-1 runs, something superseded, something gone."""

import json
import shutil
from dataclasses import dataclass

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.browse.pages import Pages
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

POINTS = [{"step": step, "loss": 3.0 - step / 4, "loss/final": 2.5} for step in range(1, 6)]
HOSTILE = "<script>alert(1)</script>"


@dataclass(frozen=True)
class Small:
    """The store and what is in it."""

    store: Store
    synth: Record
    kd: Record
    lost: Record
    first: Record
    second: Record
    ladder: Record


def metrics(points):
    return b"".join(json.dumps(point).encode() + b"\n" for point in points)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    store = Store(tmp_path_factory.mktemp("browse") / "artifacts")
    synth = publish(store, "synth", metrics={"rows": 12})
    kd = publish(
        store,
        "synth_kd_v1",
        (synth,),
        checks=[{"name": "aligned", "passed": True, "description": HOSTILE}],
        metrics={"rows": 12, "note": HOSTILE},
        details={HOSTILE: HOSTILE},
    )
    lost = publish(store, "vpmoe", (kd,))
    runs = [
        publish(
            store,
            "vpmoe_stage1",
            (lost, kd),
            recipe_keys={"optimizer": {"lr": lr}, "steps": 5},
            files={"model.safetensors": weights},
            run={"metrics.jsonl": metrics(POINTS), "log.txt": b"done\n"},
            metrics={"loss": loss, "parameters": 26_166_479},
        )
        for lr, weights, loss in ((0.1, b"one", 1.75), (0.2, b"two", 1.5))
    ]
    row = {
        "checkpoint": "vpmoe_stage1",
        "parameters": 26_166_479,
        "layers": 16,
        "tokens": 512,
        "core8": 0.25,
        "core8_stderr": 0.01,
        "delta": None,
        "metrics": {"ppl/text/nll": 9.5},
        "refused": {},
    }
    evaluation = publish(store, "eval_vpmoe_stage1", (runs[1],))
    ladder = publish(
        store,
        "ladder_report",
        (evaluation,),
        files={"ladder.json": json.dumps({"checkpoints": [row]}).encode()},
    )
    publish(store, "synth", files={"x": b"newer"})
    publish(store, "refused", checks=[{"name": "sha256", "passed": False, "description": "not the pin"}])
    shutil.rmtree(store.directory(lost))
    return Small(store, synth, kd, lost, *runs, ladder)


@pytest.fixture(scope="module")
def pages(small) -> Pages:
    return Pages(small.store)
