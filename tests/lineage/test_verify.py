import json
import shutil
from dataclasses import asdict

import pytest

from tests.lineage.fabricate import damage, publish, state_verdict
from vpmoe_assets.lineage.digest import merkle_root, scan_tree
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import RECORD_NAME, Objects, Record, record_bytes
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_artifact, verify_experiment, verify_record


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def chain(store):
    """synth -> synth_harmony -> synth_kd_v1, which also names synth itself."""
    synth = publish(store, "synth")
    harmony = publish(store, "synth_harmony", (synth,), manifest={"rows": 1}, run={"log.txt": b"log"})
    return synth, harmony, publish(store, "synth_kd_v1", (harmony, synth))


def found(problems):
    return [(p.kind, p.artifact.split("/")[1], p.path) for p in problems]


def test_an_intact_ancestry_has_no_problems(store, chain):
    assert verify_record(store, chain[-1]) == []


@pytest.mark.parametrize("generation", [0, 1, 2])
@pytest.mark.parametrize("offset", [0, 150, 299])
def test_one_flipped_bit_anywhere_in_the_ancestry_is_found_and_named(store, chain, generation, offset):
    record = chain[generation]
    damage(store.payload(record) / "data.bin", offset)
    assert found(verify_record(store, chain[-1])) == [("content", record.asset, "payload/data.bin")]
    assert verify_record(store, chain[-1], hasher=None) == []


def test_every_kind_of_damage_is_told_apart(store, chain):
    payload = store.payload(chain[-1])
    (payload / "data.bin").unlink()
    (payload / "extra").write_bytes(b"")
    odd = payload / "sub" / "odd name\n€.txt"
    odd.chmod(0o644)
    odd.write_bytes(b"x")
    assert found(verify_record(store, chain[-1], hasher=None)) == [
        ("missing", "synth_kd_v1", "payload/data.bin"),
        ("extra", "synth_kd_v1", "payload/extra"),
        ("size", "synth_kd_v1", "payload/sub/odd name\n€.txt"),
    ]


@pytest.mark.parametrize("path", ["run/log.txt", "manifest.json"])
def test_run_files_and_the_manifest_are_verified_too(store, chain, path):
    damage(store.directory(chain[1]) / path)
    assert found(verify_record(store, chain[-1])) == [("content", "synth_harmony", path)]


def test_an_added_manifest_is_noticed(store, chain):
    (store.directory(chain[0]) / "manifest.json").write_text("{}")
    assert found(verify_record(store, chain[0])) == [("extra", "synth", "manifest.json")]


def rewrite(store, record, **changes):
    """Put another record, with digests that agree, in the place of one."""
    path = store.directory(record) / RECORD_NAME
    fields = json.loads(path.read_text())
    del fields["record_digest"]
    written = Record.model_validate(fields | changes)
    path.chmod(0o644)
    path.write_bytes(record_bytes(written))
    return written


def test_an_ancestor_with_the_same_content_under_another_record_is_a_note(store, chain):
    synth = chain[0]
    written = rewrite(store, synth, seed=99)
    problems = verify_record(store, chain[-1])
    assert found(problems) == [("ancestor", name, RECORD_NAME) for name in ("synth_kd_v1", "synth_harmony")]
    assert {each.severity for each in problems} == {"note"}
    assert written.record_digest in problems[0].message
    assert synth.record_digest in problems[0].message
    assert found(verify_record(store, synth)) == [("record", "synth", RECORD_NAME)]


def test_an_ancestor_with_other_content_is_a_problem(store, chain):
    (store.payload(chain[0]) / "data.bin").chmod(0o644)
    (store.payload(chain[0]) / "data.bin").write_bytes(b"other")
    files = scan_tree(store.payload(chain[0]))
    rewrite(store, chain[0], files=[asdict(each) for each in files], digest=merkle_root(files))
    problems = verify_record(store, chain[1])
    assert [(each.kind, each.severity) for each in problems] == [("ancestor", "problem")]


# What was known before.


@pytest.fixture
def index(store, chain):
    index = Index(store.root / "index.duckdb")
    assert index.update(store) is None
    return index


def problems_of(store, index, record=None):
    done = (
        verify_experiment(store, index, "smoke") if record is None else verify_artifact(store, index, record)
    )
    return [(each.kind, each.artifact) for each in done.problems]


def test_a_rewritten_leaf_record_with_digests_that_agree_is_found_and_named(store, chain, index):
    leaf = chain[-1]
    assert problems_of(store, index) == []
    written = rewrite(store, leaf, metrics={"loss": 0.1})
    done = verify_experiment(store, index, "smoke")
    assert [str(each) for each in done.problems] == [
        f"smoke/synth_kd_v1/{leaf.version}/{RECORD_NAME}: rewritten: its record digest is "
        f"{written.record_digest}, but the index and the ledger know of {leaf.record_digest}"
    ]
    assert problems_of(store, index, store.find("smoke", "synth_kd_v1", None)) != []
    assert problems_of(store, index, chain[1]) == [], "what it came from is not concerned"
    # The index is no longer independent once it was made again; the ledger still is.
    index.rebuild(store)
    assert problems_of(store, index) == [("rewritten", f"smoke/synth_kd_v1/{leaf.version}")]
    shutil.rmtree(store.root / ".records")
    assert problems_of(store, index) == []


def test_a_record_in_the_ledger_that_never_became_visible_is_no_version_that_is_gone(store, chain, index):
    leaf = publish(store, "never", experiment="smoke")
    shutil.rmtree(store.directory(leaf))
    assert problems_of(store, index) == []


def test_a_statement_about_it_remembers_a_record_where_the_index_is_gone(store, chain, index):
    leaf = publish(store, "eval", (chain[-1],), checks=[{"name": "x", "passed": True}])
    rewrite(store, leaf, metrics={"loss": 0.1})
    index.path.unlink()
    done = verify_experiment(store, index, "smoke")
    assert [(each.kind, each.artifact) for each in done.problems] == [
        ("rewritten", f"smoke/eval/{leaf.version}")
    ]
    assert f"a statement and the ledger know of {leaf.record_digest}" in done.problems[0].message
    assert [each.kind for each in done.notes] == ["witness"], "who could not be asked is said"


def test_a_version_that_is_gone_is_named_unless_it_was_collected(store, chain, index):
    leaf = chain[-1]
    shutil.rmtree(store.directory(leaf))
    assert problems_of(store, index) == [("vanished", f"smoke/synth_kd_v1/{leaf.version}")]
    store.statements.append(Statement.about(leaf, "collected"))
    assert problems_of(store, index) == []
    store.statements.append(Statement.about(leaf, "restored", {"lost": []}))
    assert problems_of(store, index) == [("vanished", f"smoke/synth_kd_v1/{leaf.version}")]


def test_an_input_that_was_collected_is_a_note(store, chain, index):
    shutil.rmtree(store.directory(chain[0]))
    assert ("ancestor", f"smoke/synth_harmony/{chain[1].version}") in problems_of(store, index)
    store.statements.append(Statement.about(chain[0], "collected"))
    assert problems_of(store, index) == []
    assert [each.severity for each in verify_record(store, chain[1])] == ["note"]


def test_evidence_that_was_lost_before_a_version_was_restored_is_a_note(store, chain, index):
    (store.directory(chain[1]) / "run" / "log.txt").unlink()
    assert found(verify_record(store, chain[1])) == [("missing", "synth_harmony", "run/log.txt")]
    store.statements.append(Statement.about(chain[1], "restored", {"run": None, "lost": ["log.txt"]}))
    assert problems_of(store, index) == []
    (note,) = verify_record(store, chain[1])
    assert (note.severity, note.path) == ("note", "run/log.txt")


def test_altered_statements_are_a_problem(store, chain, index):
    publish(store, "eval", checks=[{"name": "x", "passed": True}])
    (path,) = (store.root / ".statements").rglob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b"passed", b"failed"))
    assert problems_of(store, index) == [("statement", "smoke/eval")]
    assert problems_of(store, index, chain[-1]) == []


def test_a_version_published_or_judged_while_it_is_verified_is_no_problem(store, chain, index, monkeypatch):
    from vpmoe_assets.lineage import verify

    real = verify.sightings

    def meanwhile(*arguments):
        known = real(*arguments)
        publish(store, "new", (chain[-1],))
        state_verdict(store, chain[0], name="late", passed=False)
        assert index.update(store) is None
        return known

    monkeypatch.setattr(verify, "sightings", meanwhile)
    assert problems_of(store, index) == []


def test_another_experiments_damage_is_none_of_this_one(store, chain, index):
    other = publish(store, "synth", experiment="full")
    damage(store.payload(other) / "data.bin")
    index.update(store)
    shutil.rmtree(store.directory(publish(store, "synth", experiment="full")))
    assert problems_of(store, index) == []


def test_a_missing_or_unreadable_ancestor_is_noticed(store, chain):
    path = store.directory(chain[0]) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{}")
    assert [p[0] for p in found(verify_record(store, chain[1]))] == ["ancestor"]
    shutil.rmtree(store.directory(chain[0]))
    problems = verify_record(store, chain[-1])
    assert {p[:2] for p in found(problems)} == {("ancestor", "synth_harmony"), ("ancestor", "synth_kd_v1")}
    assert "no longer in the store" in problems[0].message


def test_shared_ancestors_are_read_once(store, chain, monkeypatch):
    from vpmoe_assets.lineage import verify

    read = []
    real = verify.payload_problems
    monkeypatch.setattr(verify, "payload_problems", lambda d, r, h: read.append(r.asset) or real(d, r, h))
    seen: set[str] = set()
    for record in chain:
        assert verify_record(store, record, seen=seen) == []
    assert sorted(read) == ["synth", "synth_harmony", "synth_kd_v1"]


def test_an_object_that_a_record_names_and_that_is_gone_or_damaged_is_named(store):
    objects = ObjectStore(store.root)
    kept = Objects(patch=objects.put(b"+a\n", "the patch"), packages=objects.put_json([], "the packages"))
    parent = publish(store, "synth", objects=kept)
    record = publish(store, "synth_harmony", (parent,))
    assert verify_record(store, record) == []
    damage(objects.path(kept.patch))
    objects.path(kept.packages).unlink()
    damaged, missing = sorted(verify_record(store, record), key=lambda problem: problem.kind)
    assert (damaged.kind, damaged.path) == ("content", f".objects/{kept.patch}")
    assert (missing.kind, missing.path) == ("missing", f".objects/{kept.packages}")
    assert damaged.artifact == missing.artifact == f"smoke/synth/{parent.version}"
    assert [problem.kind for problem in verify_record(store, record, hasher=None)] == ["missing"]
    assert store.require("smoke", "synth") == parent  # its own bytes are what they were
