"""Builds: the same bytes by every way, manifests, refusals that leave nothing behind."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from tests.harmony.inputs import SEQ_LEN, build, rows, tree, write
from trainer.contract.canonical import sha256_json
from trainer.contract.files import replace_json
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.cli import main
from vpmoe_assets.errors import DataError, ShardRowError
from vpmoe_assets.harmony.build import build_kd_from_harmony, work_dir_of
from vpmoe_assets.harmony.conversation import messages
from vpmoe_assets.harmony.indexed import map_elements, read_index
from vpmoe_assets.harmony.kd_config import KdConfig
from vpmoe_assets.harmony.oracle import expected_document
from vpmoe_assets.harmony.split import split_of
from vpmoe_assets.harmony.synth_harmony import build_synth_harmony, scaffold_of
from vpmoe_assets.lineage.volatile import without_volatile

pytestmark = pytest.mark.slow

GIT_SHA = "0" * 40


@pytest.fixture(scope="module")
def content():
    made = rows(150)
    made[11]["query"] = None
    made[12]["synthetic_answer"] = ""
    made[140]["synthetic_reasoning"] = None
    return made


@pytest.fixture(scope="module")
def inputs(content, tmp_path_factory):
    directory = tmp_path_factory.mktemp("synth")
    return [
        write(directory / "a.parquet", content[:70]),
        write(directory / "b.parquet", content[70:], group=33),
    ]


@pytest.fixture(scope="module")
def built(inputs, tokenizer_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "kd"
    return output, build(inputs, output, tokenizer_dir).manifest


def test_the_shards_hold_what_the_oracle_makes_of_every_row(content, built, tokenizer_dir):
    output, manifest = built
    complete = [
        row for row in content if all(row[n] for n in ("query", "synthetic_reasoning", "synthetic_answer"))
    ]
    expected = {"train": [], "valid": []}
    for row in complete:
        document = expected_document(tokenizer_dir, messages(row, Scaffold()), SEQ_LEN)
        if document is not None:
            expected[split_of(row["synth_id"], 0.1)].append(document)
    for split, documents in expected.items():
        found = []
        for shard in manifest["splits"][split]["shards"]:
            arrays = []
            for kind in ("tokens", "lossmask", "span"):
                prefix = output / split / f"{shard['name']}_{kind}"
                index = read_index(prefix.with_suffix(".idx"))
                arrays.append(np.split(map_elements(prefix, index), np.cumsum(index.lengths)[:-1]))
            found += [tuple(part.tolist() for part in parts) for parts in zip(*arrays, strict=True)]
        assert found == documents
        assert manifest["splits"][split]["rows"] == len(documents) > 3
    assert manifest["rows"]["skipped_incomplete"] == 3
    counts = {
        name: sum(s["counts"][name] for s in manifest["splits"].values())
        for name in manifest["splits"]["train"]["counts"]
    }
    assert counts["kept"] + counts["drop_final_too_long"] + counts["drop_no_room"] == 147
    assert counts["truncated_analysis"] > 10


def test_megatron_reads_the_shards(built):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    output, manifest = built
    for split, part in manifest["splits"].items():
        for shard in part["shards"]:
            tokens, mask, span = (
                IndexedDataset(str(output / split / f"{shard['name']}_{kind}"))
                for kind in ("tokens", "lossmask", "span")
            )
            assert len(tokens) == len(mask) == len(span) == shard["rows"]
            assert tokens.sequence_lengths.tolist() == mask.sequence_lengths.tolist()
            assert sum(len(tokens[number]) for number in range(len(tokens))) == shard["tokens"]
            for number in range(len(tokens)):
                assert tokens[number][-1] == 199_999
                assert np.array_equal(mask[number], span[number] > 0)


def test_two_builds_and_any_number_of_workers_give_the_same_bytes(inputs, built, tokenizer_dir, tmp_path):
    output, manifest = built
    other = build(
        inputs, tmp_path / "other", tokenizer_dir, workers=3, created_unix_s=99, git_sha="f" * 40
    ).manifest
    assert tree(tmp_path / "other") == tree(output)
    assert manifest["created_unix_s"] != other["created_unix_s"]
    assert sha256_json(without_volatile(manifest)) == sha256_json(without_volatile(other))


def test_the_order_and_division_of_input_files_do_not_change_what_a_shard_holds(
    content, built, tokenizer_dir, tmp_path
):
    one = write(tmp_path / "one.parquet", content)
    build([one], tmp_path / "kd", tokenizer_dir)
    assert tree(tmp_path / "kd") == tree(built[0])


def harmony(inputs, directory, **options):
    defaults = {
        "scaffold": Scaffold(),
        "num_shards": 4,
        "row_group_rows": 15,
        "git_sha": GIT_SHA,
        "created_unix_s": 1,
    }
    manifest = build_synth_harmony(
        inputs, directory / "payload", directory / "state", **{**defaults, **options}
    )
    replace_json(directory / "manifest.json", manifest)
    return manifest


def from_harmony(directory, output, tokenizer_dir, config=None, **options):
    return build_kd_from_harmony(
        directory / "manifest.json",
        directory / "payload",
        output / "payload",
        output / "state",
        config=config or KdConfig(SEQ_LEN, 0.1),
        tokenizer_dir=tokenizer_dir,
        git_sha=GIT_SHA,
        created_unix_s=1,
        **options,
    )


def test_the_way_through_synth_harmony_gives_the_same_bytes(inputs, built, tokenizer_dir, tmp_path):
    harmony(inputs, tmp_path / "h")
    manifest = from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir, processes=2).manifest
    assert tree(tmp_path / "kd" / "payload") == tree(built[0])
    assert manifest["rows"] == built[1]["rows"]
    assert manifest["splits"] == built[1]["splits"]
    assert manifest["config_hash_v1"] == built[1]["config_hash_v1"]


@pytest.mark.parametrize("cap", [0, 1, 40, 93, 10_000])
def test_a_cap_takes_the_same_rows_both_ways(inputs, tokenizer_dir, tmp_path, cap):
    harmony(inputs, tmp_path / "h")
    config = KdConfig(SEQ_LEN, 0.1, max_rows=cap)
    if cap == 0:
        with pytest.raises(DataError, match="no conversation is left to write"):
            from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir, config)
        return
    manifest = from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir, config).manifest
    build(inputs, tmp_path / "direct", tokenizer_dir, max_rows=cap)
    assert tree(tmp_path / "kd" / "payload") == tree(tmp_path / "direct")
    taken = sum(
        split["counts"][name] for split in manifest["splits"].values() for name in split["counts"] if name in
        ("kept", "drop_final_too_long", "drop_no_room")
    )  # fmt: skip
    assert taken == min(cap, 147)


def test_the_manifest_says_what_was_built_and_how(built, inputs, tokenizer_dir):
    output, manifest = built
    assert json.loads((output / "manifest.json").read_text()) == manifest
    assert manifest["schema_version"] == "synth_kd_v1"
    assert (manifest["git_sha"], manifest["created_unix_s"]) == (GIT_SHA, 1)
    assert manifest["tokenizer"]["model_sha256"].startswith("446a9538")
    assert manifest["renderer"]["auto_drop_analysis"] is False
    assert [entry["rows"] for entry in manifest["input"]["files"]] == [70, 80]
    names = {
        path
        for split in manifest["splits"].values()
        for shard in split["shards"]
        for path in shard["paths"].values()
    }
    assert names == set(tree(output))
    digests = tree(output)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert len(shard["paths"]) == len(shard["bytes"]) == len(shard["sha256"]) == 6
            for kind, path in shard["paths"].items():
                assert digests[path] == shard["sha256"][kind]
                assert (output / path).stat().st_size == shard["bytes"][kind]
    assert not work_dir_of(output).exists()


def test_golden_configuration_hashes():
    assert (
        KdConfig(valid_fraction=0.1).hash_v1()
        == "faa2ee2ea0adc1b2dc2f171d31e4ab4d6b6a3a320d09a35776cceb34c006ecdc"
    )
    assert (
        KdConfig(valid_fraction=0.001).hash_v1()
        == "73f469ae8f3cdb1ddcd6219c2c90d095507048999c0d19da084423de048f91b0"
    )


def test_the_configuration_hash_follows_everything_that_changes_bytes():
    base = KdConfig().hash(Scaffold(), "input")
    others = [
        KdConfig(seq_len=1024).hash(Scaffold(), "input"),
        KdConfig(valid_fraction=0.01).hash(Scaffold(), "input"),
        KdConfig(max_rows=5).hash(Scaffold(), "input"),
        KdConfig(pack_block=5).hash(Scaffold(), "input"),
        KdConfig().hash(Scaffold(reasoning_effort="low"), "input"),
        KdConfig().hash(Scaffold(), "other"),
    ]
    assert len({base, *others}) == 7
    assert KdConfig().hash(Scaffold(), "input") == base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len"),
        ({"valid_fraction": 1.5}, "valid_fraction"),
        ({"max_rows": -2}, "max_rows"),
        ({"pack_block": 0}, "pack_block"),
        ({"workers": 0}, "processes"),
        ({"num_shards": 0}, "num_shards"),
        ({"num_shards": 101}, "two digits"),
        ({"git_sha": ""}, "git_sha"),
    ],
)
def test_arguments_out_of_range_are_refused(inputs, tokenizer_dir, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(inputs, tmp_path / "kd", tokenizer_dir, **options)
    assert not (tmp_path / "kd").exists()
    with pytest.raises(ValueError, match='must be "fail"'):
        KdConfig(on_invalid="skip")


def test_an_existing_output_is_refused_and_replaced_only_when_asked(inputs, tokenizer_dir, tmp_path):
    output = tmp_path / "kd"
    build(inputs[:1], output, tokenizer_dir)
    before = tree(output)
    with pytest.raises(DataError, match=r"exists and is not empty.*--overwrite"):
        build(inputs, output, tokenizer_dir)
    assert tree(output) == before
    build(inputs, output, tokenizer_dir, overwrite=True)
    assert tree(output) != before
    assert [path.name for path in tmp_path.iterdir()] == ["kd"]


def test_a_foreign_directory_is_never_overwritten(inputs, tokenizer_dir, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="no data set of this command"):
        build(inputs, tmp_path / "home", tokenizer_dir, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_an_empty_directory_is_a_fine_output(inputs, tokenizer_dir, tmp_path, built):
    (tmp_path / "kd").mkdir()
    build(inputs, tmp_path / "kd", tokenizer_dir)
    assert tree(tmp_path / "kd") == tree(built[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda made: made[77].update(synth_id=None),
            r"shard 02, row 77 \(a.parquet, row 77\), synth_id None: synth_id is missing",
        ),
        (
            lambda made: made[77].update(synth_id=made[5]["synth_id"]),
            r"duplicate synth_id '.*': shard 00, row 5 .* and shard 02, row 77",
        ),
        (
            lambda made: made[6].update(synth_id=made[5]["synth_id"]),
            r"duplicate synth_id '.*': shard 00, row 5 .* and shard 00, row 6",
        ),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_stops_the_build_and_nothing_is_published(
    tokenizer_dir, tmp_path, change, message, workers
):
    made = rows(120)
    change(made)
    with pytest.raises(DataError, match=message):
        build([write(tmp_path / "a.parquet", made)], tmp_path / "kd", tokenizer_dir, workers=workers)
    assert not (tmp_path / "kd").exists()


def test_nothing_to_write_is_an_error(tokenizer_dir, tmp_path):
    made = rows(4)
    for row in made:
        row["query"] = ""
    with pytest.raises(DataError, match="no conversation is left to write: 4 rows skipped"):
        build([write(tmp_path / "a.parquet", made)], tmp_path / "kd", tokenizer_dir)
    with pytest.raises(DataError, match=r"no conversation is left to write.*, 3 drop_final_too_long"):
        build([write(tmp_path / "b.parquet", rows(3))], tmp_path / "kd", tokenizer_dir, seq_len=8)
    assert not (tmp_path / "kd").exists()


def test_an_empty_split_leaves_no_files(tokenizer_dir, tmp_path):
    inputs = [write(tmp_path / "a.parquet", rows(8))]
    manifest = build(inputs, tmp_path / "kd", tokenizer_dir, valid_fraction=0.0).manifest
    assert not (tmp_path / "kd" / "valid").exists()
    assert manifest["splits"]["valid"]["rows"] == 0
    assert manifest["splits"]["valid"]["shards"] == []


def tamper(directory, change):
    """Change the conversations of a synth_harmony shard and make its manifest agree."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = json.loads((directory / "manifest.json").read_text())
    entry = manifest["storage"]["shards"][2]
    path = directory / "payload" / entry["path"]
    table = pq.read_table(path)
    stored = table["messages_json"].to_pylist()
    stored[7] = change(stored[7])
    pq.write_table(table.set_column(0, "messages_json", pa.array(stored, pa.string())), path)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    replace_json(directory / "manifest.json", manifest)


def without_final(stored):
    return json.dumps({"messages": json.loads(stored)["messages"][:-1]})


def with_role(stored):
    document = json.loads(stored)
    document["messages"][2]["role"] = "customer"
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda stored: stored[:-5], "messages_json is not valid JSON"),
        (lambda stored: None, "messages_json is missing"),
        (without_final, "message 3 is assistant/analysis; the last message must be assistant/final"),
        (with_role, "message 2 has role 'customer'"),
    ],
)
def test_a_malformed_conversation_is_named(inputs, tokenizer_dir, tmp_path, change, reason):
    harmony(inputs, tmp_path / "h")
    tamper(tmp_path / "h", change)
    with pytest.raises(
        ShardRowError, match=rf"shard 02, row 7 \(synth_harmony_shard_02.parquet\), synth_id '.+': {reason}"
    ):
        from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir)


def test_a_harmony_shard_that_is_not_the_recorded_one_is_refused(inputs, tokenizer_dir, tmp_path):
    harmony(inputs, tmp_path / "h")
    path = tmp_path / "h" / "payload" / "synth_harmony_shard_01.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_01.parquet: sha256 is .*, its manifest says"):
        from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir)
    path.unlink()
    with pytest.raises(DataError, match=r"no input file .*shard_01"):
        from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir)
    (tmp_path / "h" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="schema_version None, expected 'synth_harmony_v1'"):
        from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir)
    (tmp_path / "h" / "manifest.json").unlink()
    with pytest.raises(DataError, match="cannot read the manifest"):
        from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir)


def test_synth_harmony_has_the_documented_shape(inputs, content, tmp_path):
    import pyarrow.parquet as pq

    scaffold = Scaffold(reasoning_effort="low", instructions=None)
    manifest = harmony(inputs, tmp_path, scaffold=scaffold, num_shards=3)
    names = [f"synth_harmony_shard_{shard:02d}.parquet" for shard in range(3)]
    assert [entry["path"] for entry in manifest["storage"]["shards"]] == names
    assert scaffold_of(manifest) == scaffold
    assert manifest["storage"]["total_rows"] == 147
    assert manifest["conversion"]["skipped_rows"] == 3
    table = pq.read_table(tmp_path / "payload" / names[0])
    assert table.column_names == [
        "messages_json", "metadata_json", "synth_id", "language", "exercise", "model", "constraints",
        "seed_license", "query_seed_url",
    ]  # fmt: skip
    first = table.to_pylist()[0]
    assert json.loads(first["messages_json"]) == {"messages": messages(content[0], scaffold)}
    assert json.loads(first["metadata_json"])["synth_id"] == content[0]["synth_id"] == first["synth_id"]
    assert first["seed_license"] is None
    footer = pq.read_metadata(tmp_path / "payload" / names[0])
    assert footer.row_group(0).column(0).compression == "ZSTD"
    assert footer.row_group(0).num_rows == 15


def test_synth_harmony_is_reproducible_and_resumes(inputs, tmp_path):
    first = harmony(inputs, tmp_path / "a")
    second = harmony(inputs, tmp_path / "b", processes=2)
    assert tree(tmp_path / "a" / "payload") == tree(tmp_path / "b" / "payload")
    assert sha256_json(without_volatile(first)) == sha256_json(without_volatile(second))
    (tmp_path / "a" / "payload" / "synth_harmony_shard_02.parquet").write_bytes(b"half")
    kept = tmp_path / "a" / "payload" / "synth_harmony_shard_01.parquet"
    before = kept.stat().st_mtime_ns
    assert harmony(inputs, tmp_path / "a") == first
    assert tree(tmp_path / "a" / "payload") == tree(tmp_path / "b" / "payload")
    assert kept.stat().st_mtime_ns == before


def build_shard(inputs, output, shard: int, *flags: str, code: int = 0):
    """Build one shard of four by the command, as a machine that builds some of them does."""
    files = [text for path in inputs for text in ("--input", str(path))]
    options = ["--seq-len", str(SEQ_LEN), "--valid-fraction", "0.1", "--shard", str(shard), "--of", "4"]
    done = CliRunner().invoke(main, ["data", "build", *files, "--output", str(output), *options, *flags])
    assert done.exit_code == code, done.output
    return done


def test_single_shards_made_alone_are_taken_over_by_the_build(inputs, built, tokenizer_dir, tmp_path):
    done = build_shard(inputs, tmp_path / "kd", 1, "--json")
    assert json.loads(done.stdout) == {"shard": 1, "of": 4, "reused": False}
    assert "shard 1 of 4: 38 of 38 rows" in done.stderr
    result = build(inputs, tmp_path / "kd", tokenizer_dir)
    assert result.reused_shards == 1
    assert tree(tmp_path / "kd") == tree(built[0])
    refused = build_shard(inputs, tmp_path / "kd", 4, code=2)
    assert "--shard must lie in [0, 4), got 4" in refused.stderr


def test_the_texts_around_a_conversation_can_be_given_to_the_command(inputs, built, tokenizer_dir, tmp_path):
    texts = ["--reasoning-effort", "low", "--model-identity", "You are another.", "--pack-block", "16"]
    texts += ["--knowledge-cutoff", "2025-01", "--conversation-start-date", "2025-02-03"]
    build_shard(inputs, tmp_path / "kd", 0, *texts, "--omit-developer")
    scaffold = Scaffold("You are another.", "low", "2025-02-03", "2025-01", instructions=None)
    result = build(inputs, tmp_path / "kd", tokenizer_dir, scaffold=scaffold, pack_block=16)
    assert result.reused_shards == 1, "the command's shard is the build's"
    assert tree(tmp_path / "kd") != tree(built[0])
    (tmp_path / "other").mkdir()
    build_shard(inputs, tmp_path / "other" / "kd", 0, "--instructions", "Be brief.")
    assert build(inputs, tmp_path / "other" / "kd", tokenizer_dir).reused_shards == 0
    for flags, message, code in (
        (["--instructions", "Be brief.", "--omit-developer"], "contradict each other", 2),
        (["--reasoning-effort", "extreme"], "reasoning_effort must be low, medium or high", 1),
    ):
        assert message in build_shard(inputs, tmp_path / "kd2", 0, *flags, code=code).stderr
        assert not (tmp_path / "kd2").exists()


@pytest.mark.shared
def test_real_rows_come_out_as_recorded(shared_dir, tokenizer_dir, tmp_path):
    import hashlib

    import pyarrow.parquet as pq

    path = shared_dir / "synth_rows_250.parquet"
    if not path.is_file():
        pytest.skip(f"{path} not found: real rows were not built")
    build([path], tmp_path / "kd", tokenizer_dir, seq_len=4096)
    found = []
    for split in ("train", "valid"):
        for tokens in sorted((tmp_path / "kd" / split).glob("*_tokens.bin")):
            parts = []
            for kind in ("tokens", "lossmask", "span"):
                prefix = tokens.with_name(tokens.name.replace("tokens.bin", kind))
                index = read_index(prefix.with_name(prefix.name + ".idx"))
                parts.append(np.split(map_elements(prefix, index), np.cumsum(index.lengths)[:-1]))
            found += [
                tuple(hashlib.sha256(part.tobytes()).hexdigest() for part in row)
                for row in zip(*parts, strict=True)
            ]
    expected = [
        (row["tokens_sha256"], row["lossmask_sha256"], row["span_sha256"])
        for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(found) == sorted(expected)
