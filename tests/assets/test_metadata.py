"""What the UI shows of every artifact."""

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tests.assets.graphs import DATA
from vpmoe_assets.browse.links import page_url
from vpmoe_assets.lineage.record import read_record


def test_every_materialisation_says_what_it_is_where_it_lies_and_how_it_was_made(tiny_made):
    graph, run = tiny_made
    for asset in DATA:
        shown, record = run.metadata(asset), graph.latest(asset)
        payload = graph.store.payload(record)
        assert url2pathname(urlsplit(shown["dagster/uri"]).path) == shown["payload"] == str(payload)
        assert read_record(Path(shown["record"])) == record
        assert (shown["digest"], shown["fingerprint"]) == (record.digest, record.fingerprint)
        assert shown["size_bytes"] == sum(
            path.stat().st_size for path in payload.rglob("*") if path.is_file()
        )
        assert shown["recipe"] == record.recipe
        assert shown["execution"] == record.execution
        assert shown["code"].startswith(record.code.git_sha[:12])
        for name, value in record.metrics.items():
            assert shown[name] == value


def test_digest_and_code_version_are_dagsters_versions_of_data_and_code(tiny_made):
    graph, run = tiny_made
    specs = {spec.key.path[-1]: spec for spec in graph.definitions().resolve_all_asset_specs()}
    for materialization in run.materializations:
        asset = materialization.asset_key.path[-1]
        if asset == "records":
            continue
        assert materialization.tags["dagster/data_version"] == graph.latest(asset).digest
        assert materialization.tags["dagster/code_version"] == specs[asset].code_version
        assert materialization.tags["vpmoe/version"] == graph.latest(asset).version


def test_the_provenance_tree_unfolds_the_ancestry(tiny_made):
    graph, run = tiny_made
    kd, harmony, synth, tokenizer = (
        graph.latest(asset) for asset in ("synth_kd_v1", "synth_harmony", "synth", "o200k_tokenizer")
    )
    tree = [
        (0, kd, ""),
        (1, harmony, ""),
        (2, synth, ""),
        (2, tokenizer, ""),
        (1, tokenizer, " (above)"),
    ]
    assert run.metadata("synth_kd_v1")["provenance"].splitlines() == [
        f"{'  ' * depth}- [{record.asset}]({page_url(record)}) {record.version} · {record.digest[:12]}{note}"
        for depth, record, note in tree
    ]


def test_tables_and_row_counts_come_from_the_manifests(tiny_made):
    _, run = tiny_made
    assert run.metadata("synth")["dagster/row_count"] == 60
    assert "vpmoe-exercises" in run.metadata("synth")["source"]
    shards = run.metadata("synth_harmony")["shards"]
    rows = [record.data["rows"] for record in shards.records]
    assert rows == [30, 30]
    split = {
        record.data["split"]: record.data for record in run.metadata("synth_kd_v1")["truncation"].records
    }
    assert set(split) == {"train", "valid"}
    assert sum(found["kept"] for found in split.values()) == run.metadata("synth_kd_v1")["dagster/row_count"]
