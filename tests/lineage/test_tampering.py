"""A chain of ten, tampered with anywhere: found, named, and the link that is broken first is told."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest

from tests.lineage import fabricate
from tests.lineage.fabricate import CODE, damage
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.repeating import RepeatedChecks
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.facts import facts_of
from vpmoe_assets.codebase.snapshot import pack
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.links import broken_links
from vpmoe_assets.lineage.memory_audit import index_problems, ledger_problems
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.provenance import source_digest
from vpmoe_assets.lineage.record import RECORD_NAME, Objects, Record, record_bytes
from vpmoe_assets.lineage.record_audit import RecordAudit
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import Look, verify_experiment
from vpmoe_assets.lineage.witnesses import Sighting
from vpmoe_assets.verdict import Verdict

LENGTH = 10
SOURCES = {"vpmoe_assets/synth.py": b"x = 1\n", "requirements.lock": b"pyarrow==21.0.0\n"}


@dataclass
class Chain:
    """A store with ten artifacts, each made from the one before it."""

    store: Store
    index: Index
    records: list[Record]
    dagster: list[Sighting]

    def deeply(self) -> list[Problem]:
        look = Look(audit=RecordAudit(self.store), witnesses=lambda _: self.dagster)
        done = verify_experiment(self.store, self.index, "smoke", look)
        found = [*done.found, *ledger_problems(self.store, "smoke", done.heads)]
        found += index_problems(self.store, self.index, "smoke", done.heads)
        self.first = broken_links(done.heads, found)
        return found

    def problems(self) -> list[tuple[str, str]]:
        """Kind and asset of each problem."""
        return [(p.kind, p.artifact.split("/")[1]) for p in self.deeply() if p.severity == "problem"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("tampering") / "artifacts")
    objects = ObjectStore(store.root)
    kept = Objects(
        sources=objects.put(pack(SOURCES), "sources"),
        packages=objects.put_json([{"name": "PyArrow", "version": "21.0.0"}], "packages"),
    )
    path = "vpmoe_assets/synth.py"
    closure = Closure((), {path: facts_of(SOURCES[path], path).digest}, {"pyarrow": "21.0.0"})
    code = CODE.model_copy(update={"source_digest": source_digest(SOURCES)})
    records: list[Record] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fabricate, "CODE_OF_STEP", closure)
        for number in range(LENGTH):
            record = fabricate.publish(
                store,
                f"a{number}",
                tuple(records[-1:]),
                files={"data.bin": bytes([number]) * 50},
                manifest={"rows": number},
                checks=[{"name": "aligned", "passed": True}, {"name": "counted", "passed": True}],
                recipe_keys={"seed": 1234},
                objects=kept,
                code=code,
            )
            records.append(record)
    Index(store.root / "index.duckdb").rebuild(store)
    return store.root, records


@pytest.fixture
def chain(made, tmp_path):
    """A copy to tamper with; Dagster remembers all."""
    root, records = made
    shutil.copytree(root, tmp_path / "artifacts")
    store = Store(tmp_path / "artifacts")
    told = [
        Sighting("Dagster", "smoke", each.asset, each.version, each.record_digest, each.digest)
        for each in records
    ]
    return Chain(store, Index(store.root / "index.duckdb"), list(records), told)


def test_an_untouched_chain_is_intact_to_the_last_row(chain):
    assert chain.deeply() == []
    assert chain.first == []


def rewrite(chain: Chain, number: int, **changes: object) -> Record:
    """Put another record, with digests that agree, in the place of one."""
    path = chain.store.directory(chain.records[number]) / RECORD_NAME
    fields = json.loads(path.read_bytes())
    del fields["record_digest"]
    written = Record.model_validate(fields | changes)
    overwrite(path, record_bytes(written))
    chain.records[number] = written
    return written


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def below(number: int) -> list[str]:
    return [f"a{each}" for each in range(number + 1, LENGTH)]


def first(chain: Chain) -> tuple[str, list[str]]:
    """Asset of the link that is broken first, and assets of what was made from it."""
    (link,) = chain.first
    return link.artifact.split("/")[1], [each.split("/")[1] for each in link.below]


@pytest.mark.parametrize(("number", "place"), [(0, "payload/data.bin"), (4, "manifest.json")])
def test_a_file(chain, number, place):
    damage(chain.store.directory(chain.records[number]) / place)
    assert chain.problems() == [("content", f"a{number}")]
    assert first(chain) == (f"a{number}", below(number))


@pytest.mark.parametrize("number", [4, LENGTH - 1])
def test_a_record_that_was_edited(chain, number):
    path = chain.store.directory(chain.records[number]) / RECORD_NAME
    overwrite(path, path.read_bytes().replace(b'"host": "here"', b'"host": "else"'))
    found = chain.problems()
    assert ("record", f"a{number}") in found
    assert {asset for _, asset in found} <= {f"a{number}", f"a{number + 1}"}
    assert first(chain) == (f"a{number}", below(number))


@pytest.mark.parametrize("number", [0, LENGTH - 1])
def test_a_record_that_was_rewritten_with_digests_that_agree(chain, number):
    rewrite(chain, number, metrics={"loss": 0.1})
    assert ("rewritten", f"a{number}") in chain.problems()
    assert first(chain) == (f"a{number}", below(number))


def test_an_edge_that_leads_elsewhere(chain):
    """The record names its grandparent in the place of its parent."""
    other = chain.records[3].as_input().model_dump()
    rewrite(chain, 5, inputs=[other])
    found = chain.problems()
    assert ("rewritten", "a5") in found
    assert ("fingerprint", "a5") in found, "its fingerprint was taken over another input"
    assert first(chain) == ("a5", below(5))


def test_an_edge_that_leads_to_other_content(chain):
    rewrite(chain, 5, inputs=[{**chain.records[4].as_input().model_dump(), "digest": "0" * 64}])
    assert {("ancestor", "a5"), ("fingerprint", "a5"), ("rewritten", "a5")} <= set(chain.problems())
    assert first(chain) == ("a5", below(5))


def test_a_version_that_is_gone(chain):
    shutil.rmtree(chain.store.directory(chain.records[4]))
    assert chain.problems() == [("ancestor", "a5"), ("vanished", "a4")]
    assert first(chain) == ("a4", below(4))


def test_an_object(chain):
    damage(ObjectStore(chain.store.root).path(str(chain.records[0].objects.packages)))
    assert set(chain.problems()) == {("content", f"a{number}") for number in range(LENGTH)}
    assert first(chain) == ("a0", below(0))


def test_a_snapshot_that_was_exchanged_for_another_code(chain):
    """Its name is right, and the record that names it, with the copies of that: but not the fingerprint."""
    other = pack({**SOURCES, "vpmoe_assets/synth.py": b"x = 2\n"})
    sha256 = ObjectStore(chain.store.root).put(other, "sources")
    kept = chain.records[9].objects.model_copy(update={"sources": sha256})
    rewrite(chain, 9, objects=kept.model_dump())
    remember(chain, 9)
    chain.index.rebuild(chain.store)
    assert set(chain.problems()) == {("sources", "a9")}
    assert any("has vpmoe_assets/synth.py with" in each.message for each in chain.first[0].problems)


def test_a_statement_that_was_altered(chain):
    path = statements_of(chain, 4)
    overwrite(path, path.read_bytes().replace(b"passed", b"failed"))
    assert ("statement", "a4") in chain.problems()


def test_statements_of_which_the_last_was_taken_out(chain):
    path = statements_of(chain, 4)
    overwrite(path, path.read_bytes().splitlines(keepends=True)[0])
    assert chain.problems() == [("statement", "a4")]
    assert "the index knows of it: verdict by vpmoe" in chain.first[0].problems[0].message
    path.unlink()
    assert chain.problems() == [("statement", "a4"), ("statement", "a4")]


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("UPDATE artifacts SET digest = repeat('0', 64) WHERE asset = 'a4'", "rewritten"),
        ("UPDATE artifacts SET seed = 99 WHERE asset = 'a4'", "index"),
        ("UPDATE files SET sha256 = repeat('0', 64) WHERE asset = 'a4'", "index"),
        ("DELETE FROM inputs WHERE asset = 'a4'", "index"),
        ("UPDATE checks SET passed = false WHERE asset = 'a4' AND name = 'aligned'", "index"),
        ("DELETE FROM artifacts WHERE asset = 'a4'", "index"),
    ],
)
def test_the_index(chain, sql, kind):
    with duckdb.connect(str(chain.index.path)) as database:
        database.execute(sql)
    found = chain.problems()
    assert (kind, "a4") in found
    assert {asset for _, asset in found} == {"a4"}
    assert first(chain) == ("a4", below(4))


@pytest.mark.parametrize("what", ["altered", "removed", "manifest", "unnamed"])
def test_the_ledger(chain, what):
    record, ledger = chain.records[4], chain.store.ledger
    if what == "altered":
        overwrite(ledger.path(record.record_digest), b"{}")
    elif what == "removed":
        ledger.path(record.record_digest).unlink()
    elif what == "manifest":
        overwrite(ledger.manifest(record.manifest.sha256), b"{}")
    else:
        (ledger.root / "by-fingerprint" / record.fingerprint[:2] / record.fingerprint).unlink()
    assert chain.problems() == [("ledger", "a4")]
    assert first(chain) == ("a4", below(4))


@pytest.mark.parametrize("name", ["payload", "manifest.json", RECORD_NAME])
def test_a_part_of_a_version_that_is_a_link_to_the_same_bytes_elsewhere(chain, tmp_path, name):
    place = chain.store.directory(chain.records[4]) / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert chain.problems() == [("unsafe", "a4")]
    assert first(chain) == ("a4", below(4))


def test_what_was_put_beside_the_payload(chain):
    (chain.store.directory(chain.records[4]) / "notes").mkdir()
    assert chain.problems() == [("extra", "a4")]


def test_versions_that_took_each_others_place_or_name(chain):
    four, five = (chain.store.directory(chain.records[number]) for number in (4, 5))
    for one, other in ((four, four.parent / "aside"), (five, four), (four.parent / "aside", five)):
        one.rename(other)
    assert {asset for _, asset in chain.problems()} >= {"a4", "a5"}


def test_a_copy_of_a_version_under_another_name(chain):
    place = chain.store.directory(chain.records[4])
    shutil.copytree(place, place.with_name(f"20260101.9-{place.name[-8:]}"))
    assert chain.problems() == [("record", "a4")]


def test_a_line_of_the_ledger_about_nothing(chain):
    (path,) = (chain.store.ledger.root / "by-fingerprint").glob(f"*/{chain.records[4].fingerprint}")
    with path.open("a") as file:
        file.write(f"\n{'0' * 64} smoke a4 20260101.9-00000000\n")
    assert chain.problems() == [("ledger", "a4")]


def test_a_ledger_that_is_gone(chain):
    shutil.rmtree(chain.store.ledger.root)
    assert chain.problems() == [("ledger", record.asset) for record in chain.records]


@pytest.mark.parametrize("sql", ["UPDATE files SET asset = 'other' WHERE asset = 'a4'", None])
def test_an_index_of_what_there_is_not_and_one_that_is_none(chain, sql):
    if sql is None:
        chain.index.path.write_bytes(b"no database" * 500)
        assert [(each.kind, each.artifact) for each in chain.deeply() if each.severity == "problem"] == [
            ("index", "smoke")
        ]
        return
    with duckdb.connect(str(chain.index.path)) as database:
        database.execute(sql)
    assert chain.problems() == [("index", "a4"), ("index", "other")]


@pytest.mark.parametrize("field", ["digest", "record_digest"])
def test_dagsters_events(chain, field):
    told = chain.dagster[4]
    chain.dagster[4] = Sighting(
        **{name: getattr(told, name) for name in Sighting.__slots__} | {field: "0" * 64}
    )
    assert chain.problems() == [("rewritten", "a4")]
    assert "Dagster knows" in chain.first[0].problems[0].message


def _starts_with_its_number(item, inputs):
    return Verdict((item.payload / "data.bin").read_bytes()[:1] == b"\x04", "starts with its number", {})


def test_a_verdict_that_the_files_no_longer_bear_out_is_found_by_running_the_check_again(chain):
    check = Check("aligned", _starts_with_its_number, True, "x")
    fabricate.state_verdict(chain.store, chain.records[4], name="aligned", version=check.version, passed=True)
    again = RepeatedChecks(chain.store, {"a4": [check]})
    notes = {each.message.partition(": ")[2][:14] for each in again(chain.records[4])}
    assert (again.passed, notes) == (1, {"not run again:"}), "of `counted` present code has none"
    damage(chain.store.payload(chain.records[4]) / "data.bin")
    found = [each for each in again(chain.records[4]) if each.severity == "problem"]
    assert [(each.kind, each.message) for each in found] == [
        ("check", "check aligned: passed before; now it fails: starts with its number")
    ]


# An adversary who rewrites a record, and everything that was made from it, so that all digests agree.


def statements_of(chain: Chain, number: int) -> Path:
    record = chain.records[number]
    return chain.store.root / ".statements" / "smoke" / record.asset / f"{record.record_digest}.jsonl"


def remember(chain: Chain, number: int) -> None:
    """Make ledger, index, statements and Dagster know a rewritten record alone."""
    record = chain.records[number]
    place = chain.store.root / ".statements" / "smoke" / record.asset
    shutil.rmtree(place)
    for path in (chain.store.root / ".records").rglob("*"):
        if path.is_file() and f"smoke {record.asset} ".encode() in path.read_bytes():
            path.unlink()
    chain.store.ledger.put(record, chain.store.directory(record))
    chain.dagster[number] = Sighting("Dagster", "smoke", record.asset, record.version, record.record_digest)


def rewritten_from(chain: Chain, number: int) -> None:
    rewrite(chain, number, metrics={"loss": 0.1})
    for each in range(number + 1, LENGTH):
        rewrite(chain, each, inputs=[chain.records[each - 1].as_input().model_dump()])


@pytest.mark.parametrize("witness", ["the ledger", "a statement", "the index", "Dagster"])
def test_everything_rewritten_so_that_it_agrees_is_told_by_whoever_remembers(chain, witness):
    kept = list(chain.dagster) if witness == "Dagster" else []
    index = chain.index.path.read_bytes()
    statements, records = chain.store.root / ".statements", chain.store.root / ".records"
    for directory in (statements, records):
        shutil.copytree(directory, directory.with_name(f"kept{directory.name}"))
    rewritten_from(chain, 6)
    for number in range(6, LENGTH):
        remember(chain, number)
    chain.index.rebuild(chain.store)
    if witness == "Dagster":
        assert chain.problems() == [], "nobody in the store can tell now"
    chain.dagster = kept
    if witness == "the index":
        chain.index.path.write_bytes(index)
    for name, directory in (("a statement", statements), ("the ledger", records)):
        if witness == name:
            shutil.rmtree(directory)
            directory.with_name(f"kept{directory.name}").rename(directory)
    told = [each for each in chain.deeply() if each.kind == "rewritten"]
    assert [each.artifact.split("/")[1] for each in told] == [f"a{number}" for number in range(6, LENGTH)]
    assert all(f"{witness} know" in each.message for each in told)
    assert first(chain) == ("a6", below(6))
