"""Each check passes on good data and fails, naming the fault, on data that someone changed."""

import copy
import json
import shutil

import numpy as np
import pytest

from tests.harmony.inputs import rows, write
from tests.harmony.test_build import from_harmony, harmony
from vpmoe_assets.harmony import audit
from vpmoe_assets.harmony.tokenizer import RANKS_NAME, write_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_dir):
    root = tmp_path_factory.mktemp("made")
    inputs = [write(root / "a.parquet", rows(90))]
    harmony_manifest = harmony(inputs, root / "h", num_shards=2)
    manifest = from_harmony(root / "h", root / "kd", tokenizer_dir).manifest
    return root, harmony_manifest, manifest


@pytest.fixture
def copied(made, tmp_path):
    root, harmony_manifest, manifest = made
    for part in ("h", "kd"):
        shutil.copytree(root / part / "payload", tmp_path / part)
    return tmp_path, copy.deepcopy(harmony_manifest), copy.deepcopy(manifest)


def sample(root, harmony_manifest, manifest, tokenizer_dir, **options):
    return audit.sample_renders_alike(
        root / "kd",
        manifest,
        root / "h",
        harmony_manifest,
        tokenizer_dir,
        **{"seed": 1, "sample": 90, **options},
    )


def overwrite(path, dtype, position, value):
    data = np.memmap(path, dtype=dtype, mode="r+")
    data[position] = value
    data.flush()


def test_everything_passes_on_a_good_build(copied, tokenizer_dir):
    root, harmony_manifest, manifest = copied
    outcomes = [
        audit.tokenizer_agrees(tokenizer_dir),
        audit.golden_conversation(tokenizer_dir),
        audit.harmony_manifest_matches(root / "h", harmony_manifest),
        audit.kd_manifest_matches(root / "kd", manifest),
        audit.arrays_aligned(root / "kd", manifest),
        audit.split_rule_holds(manifest, root / "h", harmony_manifest),
        sample(root, harmony_manifest, manifest, tokenizer_dir),
    ]
    assert [outcome.description for outcome in outcomes if not outcome.passed] == []
    for outcome in outcomes:
        json.dumps(outcome.metadata)
    assert sum(outcomes[-1].metadata.values()) == 90


def test_a_damaged_tokenizer_fails(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / RANKS_NAME).write_bytes(b"x")
    outcome = audit.tokenizer_agrees(tmp_path)
    assert not outcome.passed
    assert "sha256" in outcome.description


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "shard_01.parquet is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda path: overwrite(path, "u1", 99, 0), "has sha256"),
        (lambda path: path.with_name("more.parquet").write_bytes(b""), "more.parquet is not in the manifest"),
    ],
)
def test_harmony_shards_that_are_not_those_of_the_manifest_fail(copied, damage, message):
    root, harmony_manifest, _ = copied
    damage(root / "h" / "synth_harmony_shard_01.parquet")
    outcome = audit.harmony_manifest_matches(root / "h", harmony_manifest)
    assert not outcome.passed
    assert message in outcome.description


def test_a_wrong_row_count_in_the_harmony_manifest_fails(copied):
    root, harmony_manifest, _ = copied
    harmony_manifest["storage"]["shards"][0]["rows"] += 1
    assert "rows is 45" in audit.harmony_manifest_matches(root / "h", harmony_manifest).description


def test_kd_files_that_are_not_those_of_the_manifest_fail(copied):
    root, _, manifest = copied
    manifest["splits"]["train"]["rows"] += 1
    assert "its shards add up to" in audit.kd_manifest_matches(root / "kd", manifest).description
    manifest["splits"]["train"]["rows"] -= 1
    overwrite(root / "kd" / "train" / "shard_00_span.bin", "u1", 300, 2)
    outcome = audit.kd_manifest_matches(root / "kd", manifest)
    assert not outcome.passed
    assert "train/shard_00_span.bin has sha256" in outcome.description


@pytest.mark.parametrize(
    ("kind", "dtype", "position", "value", "message"),
    [
        ("tokens", "<i4", 5, 201_088, "outside the vocabulary"),
        ("tokens", "<i4", 5, -1, "outside the vocabulary"),
        ("tokens", "<i4", -1, 200_002, "does not end with the EOD"),
        ("tokens", "<i4", 50, 199_999, "EOD tokens in"),
        ("lossmask", "u1", 10, 1, "the loss mask is not 1 exactly where"),
        ("lossmask", "u1", 10, 2, "the loss mask is not 1 exactly where"),
        ("span", "u1", 10, 3, "the loss mask is not 1 exactly where"),
    ],
)
def test_arrays_that_break_an_invariant_fail(copied, kind, dtype, position, value, message):
    root, _, manifest = copied
    overwrite(root / "kd" / "train" / f"shard_01_{kind}.bin", dtype, position, value)
    outcome = audit.arrays_aligned(root / "kd", manifest)
    assert not outcome.passed
    assert message in outcome.description
    assert "train/shard_01" in outcome.description


def test_sidecars_with_other_lengths_fail(copied):
    root, _, manifest = copied
    for suffix in ("bin", "idx"):
        shutil.copy(
            root / "kd" / "train" / f"shard_00_span.{suffix}",
            root / "kd" / "train" / f"shard_01_span.{suffix}",
        )
    assert "other document lengths" in audit.arrays_aligned(root / "kd", manifest).description


def test_a_changed_token_or_label_is_found_by_rendering_again(copied, tokenizer_dir):
    root, harmony_manifest, manifest = copied
    path = root / "kd" / "train" / "shard_00_tokens.bin"
    overwrite(path, "<i4", 130, int(np.memmap(path, "<i4", mode="r")[130]) + 1)
    overwrite(root / "kd" / "valid" / "shard_01_lossmask.bin", "u1", 3, 1)
    outcome = sample(root, harmony_manifest, manifest, tokenizer_dir)
    assert not outcome.passed
    assert len(outcome.metadata["faults"]) == 2
    assert "row 0" in outcome.description


def test_the_sample_is_the_seeds(copied, tokenizer_dir):
    root, harmony_manifest, manifest = copied
    path = root / "kd" / "train" / "shard_00_tokens.bin"
    data = np.memmap(path, "<i4", mode="r+")
    data[:] = np.where(data == 199_999, data, 1)
    data.flush()
    first = sample(root, harmony_manifest, manifest, tokenizer_dir, sample=12)
    assert first == sample(root, harmony_manifest, manifest, tokenizer_dir, sample=12)
    assert first != sample(root, harmony_manifest, manifest, tokenizer_dir, sample=12, seed=2)


def test_rows_in_the_wrong_split_fail(copied):
    root, harmony_manifest, manifest = copied
    manifest["config"]["valid_fraction"] = 0.5
    outcome = audit.split_rule_holds(manifest, root / "h", harmony_manifest)
    assert not outcome.passed
    assert "the ids say" in outcome.description


def test_a_conversation_with_a_word_too_long_for_openai_harmony_is_passed_over(tmp_path, tokenizer_dir):
    content = rows(12)
    content[3]["synthetic_reasoning"] = "".join(chr(0x0E01 + i * 7919 % 45) for i in range(60_000))
    content[5]["query"] = "x" + " " * 1_000_100 + "y"
    harmony_manifest = harmony([write(tmp_path / "a.parquet", content)], tmp_path / "h", num_shards=1)
    manifest = from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir).manifest
    counts = [split["counts"] for split in manifest["splits"].values()]
    assert (
        sum(count["truncated_analysis"] for count in counts) >= 2
    )  # both are cut to their room, not refused
    paths = (tmp_path / "kd/payload", manifest, tmp_path / "h/payload", harmony_manifest, tokenizer_dir)
    verdict = audit.sample_renders_alike(*paths, seed=1, sample=12)
    assert verdict.passed
    assert (
        "10 conversations rendered again, all equal; 2 passed over, which have words" in verdict.description
    )
    assert verdict.metadata["passed_over"] == 2


def test_a_sample_of_which_nothing_can_be_compared_fails(tmp_path, tokenizer_dir):
    content = [{**rows(1)[0], "synthetic_reasoning": "A" * 30_000}]
    harmony_manifest = harmony([write(tmp_path / "a.parquet", content)], tmp_path / "h", num_shards=1)
    manifest = from_harmony(tmp_path / "h", tmp_path / "kd", tokenizer_dir).manifest
    paths = (tmp_path / "kd/payload", manifest, tmp_path / "h/payload", harmony_manifest, tokenizer_dir)
    verdict = audit.sample_renders_alike(*paths, seed=1, sample=12)
    assert not verdict.passed
    assert "nothing was compared" in verdict.description
