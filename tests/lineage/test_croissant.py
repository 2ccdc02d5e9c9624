"""A data set's card, read by mlcroissant: valid, and its rows are those of the files."""

import hashlib
import io
import json
import shutil

import mlcroissant
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from tests.lineage.fabricate import index_of, publish
from vpmoe_assets.cli import main
from vpmoe_assets.lineage.croissant import croissant
from vpmoe_assets.lineage.errors import ComparisonError
from vpmoe_assets.lineage.model_card import data_card

ROWS = [{"text": f"row {n}", "words": n, "tags": ["a", "b"]} for n in range(5)]
HUB = {
    "kind": "hub",
    "description": "PleIAs/SYNTH at a commit.",
    "repo": "PleIAs/SYNTH",
    "revision": "c" * 40,
    "storage": {},
}


def table(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


pytestmark = [
    pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated"),
    pytest.mark.filterwarnings("ignore:The inplace keyword"),
]


@pytest.fixture
def opened(store, tmp_path):
    """Open a data set's card as anybody would: beside a copy of its files."""

    def read(record):
        card = croissant(store, record)
        place = tmp_path / record.version
        shutil.copytree(store.payload(record), place)
        (place / "croissant.json").write_text(json.dumps(card))
        return card, mlcroissant.Dataset(str(place / "croissant.json"))

    return read


def texts(rows):
    return [
        {
            name.partition("/")[2]: value.decode() if isinstance(value, bytes) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def test_rows_of_parquet_and_json_lines_are_read_by_the_card(store, opened):
    files = {
        "a_0.parquet": table([{"text": row["text"], "words": row["words"]} for row in ROWS[:3]]),
        "a_1.parquet": table([{"text": row["text"], "words": row["words"]} for row in ROWS[3:]]),
        "b/one.jsonl": lines(ROWS),
        "b/two.jsonl": lines([{"other": 1.5}]),
    }
    record = publish(store, "synth", files=files, manifest={"kind": "generated", "description": "Ours."})
    card, dataset = opened(record)
    assert dataset.metadata.ctx.issues.errors == set()
    assert dataset.metadata.ctx.issues.warnings == set()
    assert card["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    sets = {each["@id"]: each["cr:annotation"]["value"] for each in card["recordSet"]}
    assert sets == {"rows": 5, "b_one": 5, "b_two": 1}
    found = texts(dataset.records("rows"))
    assert sorted(found, key=lambda row: row["words"]) == [
        {"text": row["text"], "words": row["words"]} for row in ROWS
    ]
    read = next(iter(dataset.records("b_one")))
    assert [item.decode() for item in read["b_one/tags"]] == ["a", "b"]
    objects = {each["contentUrl"]: each for each in card["distribution"] if each["@type"] == "cr:FileObject"}
    assert {name: each["sha256"] for name, each in objects.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert objects["a_0.parquet"]["contentSize"] == f"{len(files['a_0.parquet'])} B"
    assert card["license"] == "https://spdx.org/licenses/Apache-2.0"


def test_terms_citation_and_provenance_come_from_the_source_and_the_record(store, opened):
    source = publish(store, "synth", files={"x.parquet": table(ROWS[:2])}, manifest=HUB)
    shards = {
        f"train/shard_0_{array}{end}": content
        for array in ("tokens", "span")
        for end, content in ((".bin", b"0" * 20), (".idx", index_of()))
    }
    record = publish(store, "synth_kd_v1", (source,), files=shards, metrics={"rows": 2})
    card, dataset = opened(record)
    assert dataset.metadata.ctx.issues.errors == set()
    assert card["license"] == "https://huggingface.co/datasets/PleIAs/SYNTH"
    assert f"commit {'c' * 40}" in card["citeAs"]
    assert "terms of a row's seed are in its column seed_license" in card["description"]
    [parent] = card["prov:wasDerivedFrom"]
    assert parent["@id"] == f"urn:vpmoe:record:{source.record_digest}"
    assert {each["@id"]: each["cr:annotation"]["value"] for each in card["recordSet"]} == {
        "train_tokens": 2,
        "train_span": 2,
    }
    assert "int32" in card["recordSet"][1]["field"][0]["description"]
    text = data_card(store, record)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license_link"] == "https://huggingface.co/datasets/PleIAs/SYNTH"
    assert "| train_tokens | IndexedDataset | 2 | 2 |" in text.splitlines()
    assert f"  - synth@{source.version} `{source.digest[:12]}`" in text.splitlines()


def test_where_no_terms_are_known_none_are_told(store, opened):
    manifest = {"kind": "parquet", "description": "A local folder."}
    record = publish(store, "synth", files={"x.parquet": table(ROWS[:2])}, manifest=manifest)
    card, _ = opened(record)
    assert "license" not in card
    assert "No licence is known of synth." in card["description"]


def test_rows_behind_weights_are_no_source_of_what_those_said(store):
    healing = publish(store, "healing_corpus", files={"x.jsonl": lines(ROWS)}, manifest=HUB)
    teacher = publish(store, "teacher", (healing,), files={"model.safetensors": b"w"})
    rows = publish(store, "rows", (teacher,), files={"x.jsonl": lines(ROWS)})
    assert "PleIAs" not in croissant(store, rows)["description"]


def test_what_has_no_rows_or_damaged_ones_is_refused(store):
    with pytest.raises(ComparisonError, match="is no data set"):
        croissant(store, publish(store, "vpmoe", files={"model.safetensors": b"w"}))
    with pytest.raises(ComparisonError, match=r"rows cannot be read \(x.parquet: .*vpmoe verify"):
        croissant(store, publish(store, "synth", files={"x.parquet": b"PAR1"}))


def test_names_of_files_that_globs_would_confuse_are_listed_one_by_one(store, opened):
    files = {"a[1].jsonl": lines(ROWS), "b.jsonl": lines([{"other": 1}]), "c.jsonl": lines([{"other": 2}])}
    card, dataset = opened(publish(store, "synth", files=files))
    assert len(list(dataset.records("a[1]"))) == 5
    patterns = {each["@id"]: each["includes"] for each in card["distribution"] if "includes" in each}
    assert patterns == {"files/a[1]": ["a[[]1].jsonl"], "files/b_and_1_more": ["b.jsonl", "c.jsonl"]}


def test_the_verb_prints_and_writes_both_forms_of_the_card(store, tmp_path, monkeypatch):
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(store.root))
    record = publish(store, "synth", files={"x.jsonl": lines(ROWS)})
    printed = CliRunner().invoke(main, ["card", "synth", "--json"])
    assert json.loads(printed.output) == json.loads(json.dumps(croissant(store, record)))
    written = CliRunner().invoke(main, ["card", "synth", "--output", str(tmp_path / "card")])
    assert written.exit_code == 0
    assert json.loads((tmp_path / "card" / "croissant.json").read_text())["name"] == "smoke/synth"
    assert (tmp_path / "card" / "README.md").read_text() == data_card(store, record)
    inside = CliRunner().invoke(main, ["card", "synth", "--output", str(store.root / "card")])
    assert (inside.exit_code, "lies in the store" in inside.output) == (1, True)
