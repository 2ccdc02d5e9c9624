"""``VPMOE_EXPERIMENT`` chooses what the code location is; experiments do not touch one another."""

import os

import dagster as dg
import pytest

from tests.assets.graphs import DATA, Graph
from vpmoe_assets.lineage.latest import Latest
from vpmoe_assets.lineage.remembered import recorded_steps
from vpmoe_assets.lineage.staleness import standings
from vpmoe_assets.lineage.verify import verify_record


def prefixes(definitions: dg.Definitions) -> set[str]:
    return {spec.key.path[0] for spec in definitions.resolve_all_asset_specs()}


def test_smoke_is_the_default(tmp_path, monkeypatch):
    import runpy

    assert "VPMOE_EXPERIMENT" not in os.environ
    assert prefixes(runpy.run_module("vpmoe_assets.definitions")["defs"]) == {"smoke"}


@pytest.mark.parametrize("name", ["smoke", "full", "bench"])
def test_every_experiment_loads_by_its_name(tmp_path, name):
    definitions = Graph(name, tmp_path).definitions()
    assert prefixes(definitions) == {name}
    dg.Definitions.validate_loadable(definitions)


def test_a_file_is_an_experiment_of_the_name_it_states(graph):
    definitions = graph({'name = "smoke"': 'name = "from_a_file"'}, file="whatever").definitions()
    assert prefixes(definitions) == {"from_a_file"}


def test_an_unknown_experiment_is_refused_with_the_known_ones(tmp_path):
    from trainer.contract.schema.base import ConfigError

    with pytest.raises(ConfigError, match=r"smok'.*smoke"):
        Graph("smok", tmp_path).definitions()


def test_two_experiments_live_in_one_store_and_do_not_make_each_other_stale(tiny, graph):
    other = graph(
        {'name = "smoke"': 'name = "other"', "rows = 2000\n\n": "rows = 64\n\n"}, root=tiny.root, file="other"
    )
    run = other.make("o200k_tokenizer", "synth", "synth_harmony")
    made = {"o200k_tokenizer": True, "synth": False, "synth_harmony": False}
    assert run.reused() == made, "the tokenizer does not depend on the rows"
    store = tiny.store
    assert store.experiments() == ["other", "tiny"]
    mine, theirs = store.latest("tiny", "synth"), store.latest("other", "synth")
    assert (mine.metrics["rows"], theirs.metrics["rows"]) == (60, 64)
    same = {store.latest(name, "o200k_tokenizer").digest for name in ("tiny", "other")}
    assert len(same) == 1
    found = standings(store, "tiny", recorded_steps(Latest(store, "tiny")))
    assert {each.state for each in found.values()} == {"fresh"}
    assert tiny.make("synth", "synth_harmony").reused() == {"synth": True, "synth_harmony": True}
    counted = tiny.index.query("SELECT experiment, count(*) FROM latest GROUP BY ALL ORDER BY ALL").rows
    assert counted == [("other", 3), ("tiny", len(DATA))]


def test_a_copy_of_an_experiment_that_changes_a_late_step_reuses_everything_before_it(tiny, graph):
    """By records of its own, without a second copy of the bytes."""
    changes = {
        'name = "smoke"': 'name = "variant"',
        "seq_len = 1024\nvalid_fraction": "seq_len = 512\nvalid_fraction",
    }
    variant = graph(changes, root=tiny.root, file="variant")
    run = variant.make(*DATA)
    assert [asset for asset, reused in run.reused().items() if not reused] == ["synth_kd_v1"]
    for asset in DATA:
        theirs, mine = variant.store.find("tiny", asset), variant.store.find("variant", asset)
        if asset == "synth_kd_v1":
            assert mine.original is None
            continue
        assert (mine.original.experiment, mine.original.record_digest) == ("tiny", theirs.record_digest)
        assert mine.digest == theirs.digest
        assert all(
            (variant.store.payload(mine) / entry.path).samefile(variant.store.payload(theirs) / entry.path)
            for entry in mine.files
        )
        assert verify_record(variant.store, mine) == []
        assert f"{asset}: reused tiny/{asset}@{theirs.version}" in run.log()
    assert variant.make(*DATA).reused() == dict.fromkeys(DATA, True)
    assert all(len(variant.store.versions("variant", asset)) == 1 for asset in DATA)
