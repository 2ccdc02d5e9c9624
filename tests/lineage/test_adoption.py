"""What was made by hand comes in whole or not at all, and says what it is."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save

from tests.lineage.fabricate import CODE, damage, files_below, publish
from vpmoe_assets.lineage import adoption
from vpmoe_assets.lineage.adoption import Surroundings, adopt, is_adopted, origin, require_adoptable
from vpmoe_assets.lineage.errors import AdoptionError
from vpmoe_assets.lineage.foreign_files import look
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record_audit import RecordAudit
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.verify import Look, verify_artifact
from vpmoe_assets.lineage.workarea import WorkArea

ABOUT = Surroundings(CODE, {"python": "3.12.1"}, ("vpmoe", "adopt"), ("weights_complete",))
TENSORS = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)})


@pytest.fixture
def made_by_hand(tmp_path):
    directory = tmp_path / "mine"
    (directory / "payload").mkdir(parents=True)
    (directory / "payload" / "model.safetensors").write_bytes(TENSORS)
    (directory / "payload" / "config.json").write_bytes(b"{}")
    (directory / "summary.json").write_bytes(b'{"loss": 1}')
    return directory


def taken(store, directory, **options):
    return adopt(store, "smoke", "vpmoe", directory, look(directory), ABOUT, reason="by hand", **options)


def test_it_says_where_it_came_from_and_claims_nothing_else(store, made_by_hand):
    before = files_below(made_by_hand)
    record, new = taken(store, made_by_hand)
    assert new
    assert is_adopted(record)
    assert (record.recipe, record.inputs, record.seed, record.execution) == ({}, (), None, {})
    assert record.objects.model_dump(exclude_none=True) == {}
    assert record.metrics == {"parameters": 10, "tensors": 2}
    assert record.blocking_checks == ("weights_complete",)
    assert str(made_by_hand) in origin(record)
    assert (store.payload(record) / "model.safetensors").read_bytes() == TENSORS
    assert [entry.path for entry in record.run_files] == ["summary.json"]
    assert files_below(made_by_hand) == before  # copied, and nothing of it moved or changed
    [said] = [each for each in store.statements.about(record) if each.kind == "adopted"]
    assert said.reason == "by hand"
    [remark] = Remarks(store).about(record)
    assert f"from {record.details['adopted']['from']}, because: by hand" in remark.line()
    assert remark.to_dict()["state"] == "adopted"


def test_what_is_made_from_it_says_so(store, made_by_hand):
    record, _ = taken(store, made_by_hand)
    child = publish(store, "vpmoe_stage1", (record,))
    grandchild = publish(store, "vpmoe_stage2", (child,))
    [remark] = Remarks(store).about(grandchild)
    assert remark.line().startswith(f"made from vpmoe@{record.version}, adopted by ")
    assert remark.short() == "vpmoe was adopted"


def test_it_verifies_deeply_and_damage_of_it_is_named(store, made_by_hand):
    record, _ = taken(store, made_by_hand)
    index = Index(store.root / "index.duckdb")
    found = verify_artifact(store, index, record, Look(audit=RecordAudit(store)))
    assert found.problems == []
    assert any("there is no code to compare" in note.message for note in found.notes)
    damage(store.payload(record) / "model.safetensors", 100)
    found = verify_artifact(store, index, record, Look(audit=RecordAudit(store)))
    assert [each.path for each in found.problems] == ["payload/model.safetensors"]


def test_the_same_content_is_adopted_once_and_other_content_is_another_version(store, made_by_hand):
    first, _ = taken(store, made_by_hand)
    assert taken(store, made_by_hand) == (first, False)
    (made_by_hand / "payload" / "config.json").write_bytes(b"{} ")
    second, new = taken(store, made_by_hand)
    assert new
    assert second.sequence == first.sequence + 1


def test_it_never_stands_before_a_made_one_unless_it_is_asked_to(store, made_by_hand):
    publish(store, "vpmoe")
    found = look(made_by_hand)
    with pytest.raises(AdoptionError, match=r"was made here; say --replace"):
        require_adoptable(store, "smoke", "vpmoe", found, trust=False, replace=False)
    require_adoptable(store, "smoke", "vpmoe", found, trust=False, replace=True)
    taken(store, made_by_hand)
    require_adoptable(store, "smoke", "vpmoe", found, trust=False, replace=False)


def test_pickles_need_trust_which_is_recorded(store, made_by_hand):
    (made_by_hand / "payload" / "optimizer.pt").write_bytes(b"\x80\x02.")
    found = look(made_by_hand)
    with pytest.raises(AdoptionError, match=r"optimizer.pt is a pickle, .*--trust"):
        require_adoptable(store, "smoke", "vpmoe", found, trust=False, replace=False)
    require_adoptable(store, "smoke", "vpmoe", found, trust=True, replace=False)
    record, _ = taken(store, made_by_hand)
    assert record.details["adopted"]["trusted"] == ["optimizer.pt"]
    assert "pickles trusted: optimizer.pt" in origin(record)


@pytest.mark.parametrize("when", ["before", "half-way"])
def test_a_file_that_changes_meanwhile_leaves_nothing(store, made_by_hand, monkeypatch, when):
    found = look(made_by_hand)
    victim = made_by_hand / "payload" / "model.safetensors"
    copy = adoption.shutil.copyfileobj

    def copied(source, target, length):
        copy(source, target, length)
        if when == "half-way" and os.readlink(f"/proc/self/fd/{source.fileno()}") == str(victim):
            victim.write_bytes(TENSORS[:-1] + b"\x01")

    monkeypatch.setattr(adoption.shutil, "copyfileobj", copied)
    if when == "before":
        victim.write_bytes(TENSORS[:-1] + b"\x01")
    with pytest.raises(AdoptionError, match=r"model.safetensors was changed meanwhile"):
        adopt(store, "smoke", "vpmoe", made_by_hand, found, ABOUT, reason="")
    assert store.latest("smoke", "vpmoe") is None
    left = [
        path for path in (store.root / ".work").rglob("*") if path.is_file() and ".locks" not in path.parts
    ]
    assert left == []


def test_a_file_that_becomes_a_link_is_not_followed(store, made_by_hand, tmp_path):
    found = look(made_by_hand)
    victim = made_by_hand / "payload" / "config.json"
    victim.rename(tmp_path / "elsewhere.json")
    victim.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        adopt(store, "smoke", "vpmoe", made_by_hand, found, ABOUT, reason="")
    assert store.latest("smoke", "vpmoe") is None


def test_a_full_disk_leaves_nothing(store, made_by_hand, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adoption.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        taken(store, made_by_hand)
    monkeypatch.undo()
    assert store.latest("smoke", "vpmoe") is None
    assert taken(store, made_by_hand)[1]


def test_what_was_removed_and_is_adopted_again_is_restored(store, made_by_hand):
    record, _ = taken(store, made_by_hand)
    shutil.rmtree(store.directory(record))
    again, _ = taken(store, made_by_hand)
    assert again.record_digest == record.record_digest


def test_what_a_kill_left_of_an_adoption_is_no_part_of_the_next(store, made_by_hand, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    monkeypatch.setattr(adoption, "_copy_file", killed)
    monkeypatch.setattr(WorkArea, "clear", lambda area: (area.payload / "half.bin").write_bytes(b"1"))
    with pytest.raises(Killed):
        taken(store, made_by_hand)
    monkeypatch.undo()
    assert [path.name for path in (store.root / ".work").rglob("half.bin")] == ["half.bin"]
    record, _ = taken(store, made_by_hand)
    assert {entry.path for entry in record.files} == {"model.safetensors", "config.json"}
