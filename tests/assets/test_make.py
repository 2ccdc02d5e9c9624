"""`vpmoe make` over the tiny experiment: a process of its own, as a user starts it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.assets.graphs import ROOT, Graph, copy_store, write_experiment


@pytest.fixture(scope="module")
def place(tiny_made, tmp_path_factory):
    """A store with the tiny data, a Dagster home, and a way to run `vpmoe` with both."""
    directory = tmp_path_factory.mktemp("make")
    (directory / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    root = copy_store(tiny_made[0].root, directory / "artifacts")
    return Graph(write_experiment(directory / "tiny.toml"), root)


@pytest.fixture
def vpmoe(place, forks):
    def run(
        *arguments: str, code: int = 0, directory: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "VPMOE_EXPERIMENT": str(place.experiment),
            "VPMOE_ARTIFACTS": str(place.root),
            "DAGSTER_HOME": str(place.root.parent),
            **variables,
        }
        done = forks.run(["-m", "vpmoe_assets.cli", *arguments], environment=environment, directory=directory)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def test_what_is_up_to_date_is_reused_and_the_rest_is_made_with_a_line_each(place, vpmoe):
    write_experiment(place.experiment, {"row_group_rows = 2000": "row_group_rows = 30"})
    said = vpmoe("make", "synth,synth_harmony").stdout.splitlines()
    assert said[0].split() == ["ASSET", "ACTION", "WHY", "TIME", "TOKENS", "MEMORY", "DISK"]
    assert said[1].startswith("synth_harmony  build   recipe row_group_rows 2000 → 30")
    assert said[2].startswith("2 assets of tiny: 1 reused, 1 built; ")
    lines = {tuple(line.split()[:2]): line for line in said[3:]}
    assert lines["reused", "synth"].endswith("up to date")
    assert "rows 60" in lines["made", "synth_harmony"]
    assert any(line.startswith("1 made, 1 reused, in ") for line in said)
    assert not any(" - dagster - " in line for line in said)
    log = place.root / ".work" / "logs" / said[-1].rpartition("/")[2]
    assert re.search(r"^[\d:]{8} synth_harmony: check manifest_matches_shards passed$", log.read_text(), re.M)
    answer = json.loads(vpmoe("make", "synth_harmony", "--json").stdout)
    assert answer["success"]
    assert [(done["asset"], done["how"]) for done in answer["assets"]] == [("synth_harmony", "reused")]


def test_an_asset_that_fails_is_told_in_a_line_and_by_the_exit_code(place, vpmoe):
    write_experiment(place.experiment, {"row_group_rows = 2000": "row_group_rows = 40"})
    said = vpmoe("make", "synth_harmony,synth_kd_v1", code=1, VPMOE_WORKERS="none").stdout
    assert "VPMOE_WORKERS = 'none': give a number of processes, 1 or more" in said
    assert "Traceback" not in said
    assert "FAILED: 1 failed, in " in said
    assert "not reached: synth_kd_v1" in said
    assert "vpmoe why synth_harmony" in said


def test_a_selection_that_cannot_be_made_or_costs_much_is_refused_before_anything_runs(place, vpmoe):
    refused = vpmoe("make", "vpmoe", code=1).stderr
    assert "vpmoe: vpdense_80_healed is not in the store, and not selected" in refused
    assert "'+key:\"tiny/vpmoe\"'" in refused
    dear = vpmoe("make", '+key:"tiny/vpdense0_5_28_healed"', "--hours", "0", code=1).stderr
    assert "(limit 0); look at it with `vpmoe plan`, and give --yes to start it" in dear
    homeless = vpmoe("make", "synth", code=1, directory=place.root.parent, DAGSTER_HOME="").stderr
    assert "there is no DAGSTER_HOME" in homeless
    assert len(homeless.splitlines()) == 1
