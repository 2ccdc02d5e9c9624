"""What is in the graph, and what the identity of each step is taken over."""

from collections.abc import Iterator

import dagster as dg
import pytest

from tests.assets.graphs import Graph


def made(definitions: dg.Definitions) -> list[dg.AssetsDefinition]:
    return [asset for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition)]


def outside(definitions: dg.Definitions) -> list[dg.AssetSpec]:
    return [asset for asset in definitions.assets or () if isinstance(asset, dg.AssetSpec)]


def described(definitions: dg.Definitions) -> Iterator[str]:
    """One line for each asset, and one for each of its checks: a new asset adds lines and changes none."""
    for spec in outside(definitions):
        yield f"{spec.key.to_user_string()} written by others | group={spec.group_name}"
    for job in definitions.jobs or ():
        yield f"job {job.name}: {job.description}"
    steps = {spec.key: (spec, asset) for asset in made(definitions) for spec in asset.specs}
    for key in sorted(steps):
        spec, asset = steps[key]
        deps = " ".join(sorted(dep.asset_key.path[-1] for dep in spec.deps)) or "-"
        pool = f" pool={asset.op.pool}" if asset.op.pool else ""
        kinds = " ".join(sorted(spec.kinds))
        yield f"{key.to_user_string()} <- {deps} | group={spec.group_name} kinds={kinds}{pool}"
        for check in sorted(asset.check_specs, key=lambda check: check.name):
            if check.asset_key == key:
                blocking = "blocking" if check.blocking else "warning"
                yield f"{key.to_user_string()} check {check.name} {blocking}"


@pytest.mark.parametrize("experiment", ["smoke", "full", "bench"])
def test_the_graph_is_the_one_that_was_agreed_on(tmp_path, snapshot, experiment):
    """After adding an asset, run this file with `--snapshot-update` and read the diff."""
    assert "\n".join(described(Graph(experiment, tmp_path).definitions())) == snapshot


def test_every_asset_is_described_and_has_a_code_version(tmp_path):
    definitions = Graph("smoke", tmp_path).definitions()
    steps = [(spec, asset) for asset in made(definitions) for spec in asset.specs]
    assert all(spec.description for spec in outside(definitions))
    for spec, asset in steps:
        checked = {check.asset_key for check in asset.check_specs}
        assert spec.description, spec.key
        assert len(spec.description.splitlines()[0]) < 120, "the first line stands alone in lists"
        assert spec.group_name in {"sources", "data", "rungs", "distill", "evals", "perf", "lineage"}
        assert 1 <= len(spec.kinds) <= 10
        assert spec.owners == ["team:vpmoe"]
        assert spec.tags["experiment"] == "smoke"
        assert spec.tags["runs_in"] in {"trainer", "orchestrator"}
        if spec.group_name != "lineage":
            assert spec.code_version, spec.key
            assert spec.key in checked or spec.group_name == "evals", f"{spec.key} is published unchecked"
            assert all(check.description for check in asset.check_specs), spec.key


def code_versions(graph: Graph) -> dict[str, str | None]:
    return {spec.key.path[-1]: spec.code_version for spec in graph.definitions().resolve_all_asset_specs()}


def changed(before: dict[str, str | None], after: dict[str, str | None]) -> set[str]:
    return {asset for asset in before | after if before.get(asset) != after.get(asset)}


def test_code_versions_are_the_same_in_every_process_and_place(graph, tmp_path):
    mine = graph()
    assert code_versions(mine) == code_versions(mine)
    assert code_versions(mine) == code_versions(graph(root=tmp_path / "elsewhere", file="another_file"))


@pytest.mark.parametrize(
    ("old", "new", "assets"),
    [
        ("seq_len = 1024\nvalid_fraction", "seq_len = 512\nvalid_fraction", {"synth_kd_v1", "vpmoe_stage1"}),
        ("row_group_rows = 2000", "row_group_rows = 100", {"synth_harmony"}),
        ("max_tokens = 200000", "max_tokens = 6000", {"healing_text_v1"}),
        ("rows = 2000\n\n", "rows = 61\n\n", {"synth"}),
    ],
)
def test_a_changed_key_changes_the_versions_of_the_steps_that_it_decides(graph, old, new, assets):
    before = code_versions(graph())
    after = code_versions(graph({old: new}))
    known = {"o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1", "healing_corpus", "healing_text_v1"}
    assert changed(before, after) & (known | {"vpmoe_stage1"}) == assets


@pytest.mark.parametrize("top", ['name = "another"', 'name = "tiny"\nstrict_toolchain = true'])
def test_a_changed_name_or_strictness_changes_no_version(graph, top):
    assert code_versions(graph()) == code_versions(graph({'name = "smoke"': top}))
