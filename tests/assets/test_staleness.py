"""What `standings` says of each asset, beside what Dagster shows of it."""

import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from tests.assets.graphs import DATA, Graph, ProjectCopy, copy_store, write_experiment
from vpmoe_assets.codebase.tree import replace_current
from vpmoe_assets.commands.present import load_location, present_of
from vpmoe_assets.lineage.staleness import Standing, standings

FRESH = dict.fromkeys(DATA, "fresh")


@pytest.fixture(scope="module")
def made(tiny_made, tmp_path_factory) -> Graph:
    """The data of the tiny experiment, known to Dagster."""
    directory = tmp_path_factory.mktemp("staleness")
    root = copy_store(tiny_made[0].root, directory / "artifacts")
    graph = Graph(write_experiment(directory / "tiny.toml"), root)
    graph.make(*DATA)
    return graph


def states(graph: Graph) -> dict[str, Standing]:
    """Where the assets stand; each as Dagster shows it, too."""
    with graph.environment():
        present = present_of(str(graph.experiment))
    found = standings(graph.store, "tiny", present.steps, strict=present.strict)
    assets = graph.definitions().get_repository_def().asset_graph
    resolver = CachingStaleStatusResolver(graph.instance, assets, LoadingContextForTest(graph.instance))
    for key in assets.materializable_asset_keys:
        if (standing := found.get(key.path[-1])) is not None:
            shown = {"missing": StaleStatus.MISSING}.get(
                standing.state, StaleStatus.STALE if standing.marked else StaleStatus.FRESH
            )
            assert resolver.get_status(key) is shown, (standing, resolver.get_stale_causes(key))
    return found


def told(graph: Graph) -> dict[str, str]:
    """State and causes of the assets of the data."""
    return {asset: standing.summary for asset, standing in states(graph).items() if asset in DATA}


def changed(graph: Graph, changes: dict[str, str], file: str) -> Graph:
    """The same store and instance under an experiment that differs."""
    return Graph(write_experiment(graph.root.parent / file, changes), graph.root, graph.instance)


def test_what_was_just_made_is_fresh_and_the_rest_is_missing(made):
    found = states(made)
    assert {asset: found[asset].state for asset in DATA} == FRESH
    assert found["vpmoe"].state == "missing"
    assert [cause.line() for cause in found["vpmoe"].causes] == ["vpdense_80_healed is not in the store"]


def test_a_changed_config_marks_the_assets_whose_recipe_it_changes_and_tells_those_below(made):
    assert told(changed(made, {"row_group_rows = 2000": "row_group_rows = 20"}, "groups.toml")) == FRESH | {
        "synth_harmony": "stale: recipe row_group_rows 2000 → 20",
        "synth_kd_v1": "stale: synth_harmony is stale",
    }


def test_changed_code_marks_every_asset_that_it_makes(made, tmp_path):
    copy = ProjectCopy.make(tmp_path)
    try:
        path = copy.root / "vpmoe_assets" / "harmony" / "truncate.py"
        path.write_text(path.read_text() + "\nLONGEST = 1\n")
        copy.read_again()
        assert told(made) == FRESH | {
            "synth_kd_v1": "stale: code changed: vpmoe_assets/harmony/truncate.py",
        }
    finally:
        replace_current(None)


def test_what_is_remembered_is_what_the_code_location_makes(made):
    with made.environment():
        remembered, loaded = present_of(str(made.experiment)), load_location(str(made.experiment))
    assert remembered.steps.keys() == loaded["steps"].keys()
    for asset, step in loaded["steps"].items():
        digests = dict.fromkeys((*step.inputs, *step.partial), "0" * 64)
        assert remembered.steps[asset].fingerprint_of(digests) == step.fingerprint_of(digests)


def test_an_upstream_made_again_with_the_same_bytes_leaves_what_is_below_fresh_and_with_others_does_not(made):
    same = changed(made, {"row_group_rows = 2000": "row_group_rows = 3000"}, "same.toml")
    same.make("synth_harmony")
    assert told(same) == FRESH
    # From here on the latest version has another content.
    other = changed(made, {"num_shards = 4": "num_shards = 3"}, "other.toml")
    other.make("synth_harmony")
    version = other.latest("synth_harmony").version
    assert told(other) == FRESH | {"synth_kd_v1": f"stale: synth_harmony is now {version}"}
