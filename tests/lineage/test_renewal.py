"""Published files under a record of their own: in another experiment, or as the latest version once more."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lineage.fabricate import (
    FILES,
    as_of_schema_1,
    damage,
    draft,
    files_below,
    fill,
    publish,
    recipe,
    state_verdict,
)
from vpmoe_assets.lineage import filememory, hashcache
from vpmoe_assets.lineage.errors import ArtifactDamaged, PublishError
from vpmoe_assets.lineage.linking import link_tree
from vpmoe_assets.lineage.record import Origin
from vpmoe_assets.lineage.verify import verify_record


def renew(store, record, experiment="other", inputs=(), blocking_checks=(), left_over=None):
    with store.work_area(experiment, record.asset, record.fingerprint) as work:
        if left_over is not None:
            (work.payload / "left over").write_bytes(left_over)
        return store.renew(
            work,
            record,
            inputs=[item.as_input() for item in inputs],
            blocking_checks=blocking_checks,
            run="run-2",
        )


def origin(record):
    return Origin(
        experiment=record.experiment,
        asset=record.asset,
        version=record.version,
        record_digest=record.record_digest,
    )


def disk_use(path: Path) -> int:
    return int(subprocess.run(["du", "-sk", path], capture_output=True, check=True).stdout.split()[0])


def test_another_experiment_reuses_an_artifact_by_a_record_of_its_own_without_its_bytes(store):
    parent = publish(store, "synth", recipe_keys={})
    original = publish(
        store,
        "a",
        (parent,),
        recipe_keys={"k": 1},
        files={"big.bin": bytes(1 << 20), **FILES},
        manifest={"rows": 3},
        run={"log.txt": b"said"},
        metrics={"rows": 3},
        dagster_run_id="run-1",
    )
    before = disk_use(store.root)
    here = renew(store, parent)
    found = store.reusable("other", "a", original.fingerprint)
    assert found == original
    linked = renew(store, found, inputs=(here,))
    assert disk_use(store.root) - before < 200
    assert store.find("other", "a") == linked
    assert store.find("smoke", "a") == original
    assert verify_record(store, linked) == verify_record(store, original) == []
    assert linked.original == origin(original)
    assert [(ref.version, ref.record_digest) for ref in linked.inputs] == [(here.version, here.record_digest)]
    made = "files run_files manifest metrics digest fingerprint code environment command started_utc"
    for name in (*made.split(), "dagster_run_id"):
        assert getattr(linked, name) == getattr(original, name), name
    assert linked.published_utc > original.published_utc
    assert files_below(store.directory(linked) / "run") == {"log.txt": b"said"}
    assert store.reusable("other", "a", original.fingerprint) == linked
    shutil.rmtree(store.root / "smoke")
    assert verify_record(store, linked) == []


def test_a_link_of_a_link_names_who_made_the_files(store):
    original = publish(store, "a", recipe_keys={})
    second = renew(store, original, "second")
    shutil.rmtree(store.root / "smoke")
    assert store.reusable("third", "a", original.fingerprint) == second
    assert renew(store, second, "third").original == origin(original)


def test_neither_a_damaged_nor_a_vanished_artifact_of_another_experiment_is_reused_nor_one_of_another_name(
    store,
):
    first, second, third = (publish(store, "a", recipe_keys={}, experiment=name) for name in ("x", "y", "z"))
    assert store.reusable("other", "b", first.fingerprint) is None
    shutil.rmtree(store.directory(third))
    damage(store.payload(second) / "data.bin")
    assert store.reusable("other", "a", first.fingerprint) == first
    damage(store.directory(first) / ".artifact.json", 60)
    assert store.reusable("other", "a", first.fingerprint) is None


def test_an_original_that_was_damaged_meanwhile_is_not_linked(store):
    original = publish(store, "a", recipe_keys={})
    damage(store.payload(original) / "data.bin")
    with pytest.raises(ArtifactDamaged, match=r"data\.bin"):
        renew(store, original)
    assert store.latest("other", "a") is None


def test_inputs_of_other_contents_are_refused(store):
    parent, stranger = publish(store, "synth", recipe_keys={}), publish(store, "synth", files={"x": b"y"})
    original = publish(store, "a", (parent,), recipe_keys={})
    with pytest.raises(PublishError, match="not among the inputs"):
        renew(store, original, inputs=(stranger,))


def test_a_version_is_made_the_latest_again_with_its_files_and_what_was_left_of_other_attempts_goes(store):
    first = publish(store, "a", recipe_keys={"k": 1}, manifest={"rows": 3}, run={"log.txt": b"said"})
    assert renew(store, first, "smoke") is first
    publish(store, "a", recipe_keys={"k": 2}, files={"x": b"other"})
    again = renew(store, first, "smoke", left_over=b"of an attempt that was killed")
    assert store.find("smoke", "a") == again
    assert (again.sequence, again.original) == (3, origin(first))
    assert (again.files, again.run_files, again.manifest) == (first.files, first.run_files, first.manifest)
    assert verify_record(store, again) == verify_record(store, first) == []
    assert os.path.samefile(store.payload(first) / "data.bin", store.payload(again) / "data.bin")
    shutil.rmtree(store.directory(first))
    assert verify_record(store, again) == []


def test_reuse_removes_the_work_directory_of_a_publisher_that_was_killed_before_it_could(store):
    record = publish(store, "a", recipe_keys={})
    with store.work_area("smoke", "a", record.fingerprint) as work:
        (work.path / "checkpoints").mkdir()
        (work.path / "checkpoints" / "weights").write_bytes(bytes(100))
    assert work.path.exists()
    assert renew(store, record, "smoke") == record
    assert not work.path.exists()


def test_what_checks_said_of_the_original_holds_for_its_files_elsewhere_and_a_waiver_does_not(store):
    original = publish(store, "a", recipe_keys={}, blocking_checks=["aligned", "drift"])
    state_verdict(store, original, name="aligned", passed=True, description="all equal")
    state_verdict(store, original, name="loss", passed=False, blocking=False, severity="WARN")
    linked = renew(store, original, blocking_checks=["aligned", "drift"])
    found = {finding.check: finding.outcome for finding in store.findings(linked)}
    assert found == {"aligned": "passed", "loss": "failed", "drift": "undetermined"}
    assert [finding.check for finding in store.blocked_by(linked)] == ["drift"]
    reasons = {statement.reason for statement in store.statements.about(linked)}
    assert reasons == {f"found on smoke/a/{original.version}, whose files these are"}


def test_scores_name_the_checkpoint_as_it_is_called_here(store):
    checkpoint = publish(store, "vpmoe", recipe_keys={})
    score = {"object_asset": "vpmoe", "object_version": checkpoint.version, "suite": "core8", "task": "mean"}
    original = publish(store, "eval", (checkpoint,), recipe_keys={}, evals=[score | {"score": 0.5}])
    publish(store, "vpmoe", experiment="other")
    here = renew(store, checkpoint)
    assert here.version != checkpoint.version
    (renamed,) = renew(store, original, inputs=(here,)).evals
    assert (renamed.object_version, renamed.score) == (here.version, 0.5)


def test_files_that_cannot_be_linked_are_copied_and_the_original_keeps_its_mode(store, monkeypatch):
    original = publish(store, "a", recipe_keys={}, manifest={"rows": 1}, run={"log.txt": b"said"})

    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    linked = renew(store, original)
    assert verify_record(store, linked) == []
    assert not os.path.samefile(store.payload(original) / "data.bin", store.payload(linked) / "data.bin")
    for record in (original, linked):
        modes = {path.stat().st_mode & 0o777 for path in store.directory(record).rglob("*") if path.is_file()}
        assert modes == {0o444}


def test_a_link_that_fails_for_another_reason_is_no_copy(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        link_tree(tmp_path / "a", tmp_path / "b")


def test_links_inside_a_payload_stay_links(store):
    fingerprint, payload = recipe("a")
    with store.work_area("smoke", "a", fingerprint) as work:
        fill(work)
        (work.payload / "alias").symlink_to("data.bin")
        original = store.publish(work, draft(payload))
    linked = renew(store, original)
    assert (store.payload(linked) / "alias").is_symlink()
    assert verify_record(store, linked) == []


def test_linking_costs_no_second_reading_of_the_bytes(store, monkeypatch):
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)
    monkeypatch.setattr(filememory, "_SEALED_SETTLED_NS", 0)
    original = publish(store, "a", recipe_keys={})
    store.require("smoke", "a")
    real, read = hashcache.hash_files, []
    monkeypatch.setattr(hashcache, "hash_files", lambda files: read.extend(files) or real(files))
    renew(store, original)
    store.require("smoke", "a")
    store.require("other", "a")
    assert read == []


def test_a_record_of_schema_1_is_made_the_latest_again_under_one_of_schema_2_with_its_verdicts(store):
    check = {"name": "aligned", "passed": True, "blocking": True}
    first = as_of_schema_1(store, publish(store, "a", recipe_keys={"k": 1}), [check])
    publish(store, "a", recipe_keys={"k": 2})
    again = renew(store, first, "smoke", blocking_checks=["aligned"])
    assert (first.earlier, again.earlier, again.original) == (True, False, origin(first))
    assert store.require("smoke", "a") == again
    assert [finding.outcome for finding in store.findings(again)] == ["passed"]
    assert verify_record(store, again) == verify_record(store, first) == []
