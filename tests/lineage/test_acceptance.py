"""Equivalence by statement: what it binds, what it is refused for, how it ends, and who hears of it."""

import shutil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lineage.fabricate import draft, fill, publish
from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.acceptance import (
    Named,
    acceptances,
    acceptances_of,
    accepted_version,
    accepting,
    active_acceptance,
    settle_acceptances,
    waiving,
    withdrawing,
)
from vpmoe_assets.lineage.difference import Change, Difference, recipe_changes
from vpmoe_assets.lineage.errors import StatementError
from vpmoe_assets.lineage.record import InputRef, Origin, Record
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.store import Store

RECIPE = {"steps": 8, "optimizer": {"lr": 0.001, "betas": [0.9, 0.95]}}
SOURCES = {"trainer/train/run.py": "1" * 64, "trainer/model/gpt.py": "2" * 64}
PACKAGES = {"numpy": "2.5.5"}
SHOWN = {"snapshot": "f" * 64}


def identity(inputs: tuple[Record, ...] = (), **changes: Any) -> dict[str, Any]:
    fields = {"recipe": RECIPE, "sources": SOURCES, "packages": PACKAGES} | changes
    return {
        "schema": "vpmoe.fingerprint/2",
        **fields,
        "inputs": {record.asset: record.digest for record in inputs},
    }


def edited(**changes: str | None) -> dict[str, str]:
    """The sources with some files changed, added or removed."""
    found = SOURCES | {f"trainer/{name}.py": digest for name, digest in changes.items() if digest}
    return {path: digest for path, digest in found.items() if path not in changes}


def made(
    store: Store,
    asset: str,
    payload: dict[str, Any],
    content: bytes = b"weights",
    inputs: tuple[InputRef, ...] = (),
    **fields: Any,
) -> Record:
    with store.work_area("smoke", asset, sha256_json(payload)) as work:
        fill(work, {"data.bin": content})
        return store.publish(work, draft(payload, **fields).model_copy(update={"inputs": inputs}))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def record(store):
    return made(store, "vpmoe", identity())


RENAMED = identity(sources=edited(helper="3" * 64))


def accept(store: Store, record: Record, payload=RENAMED, **given: Any):
    statement = accepting(
        record,
        payload,
        acceptances_of(record, store.statements),
        **{"reason": "a variable was renamed", "shown_by": SHOWN, **given},
    )
    return store.statements.append(statement)


# What an acceptance binds.


def test_an_accepted_artifact_counts_for_the_fingerprint_of_present_code_and_no_other(store, record):
    fingerprint = sha256_json(RENAMED)
    assert accepted_version(store, "smoke", "vpmoe", fingerprint) is None
    written = accept(store, record)
    found, by = accepted_version(store, "smoke", "vpmoe", fingerprint)
    assert (found.record_digest, by.statement.id) == (record.record_digest, written.id)
    later = identity(sources=edited(helper="4" * 64))
    assert accepted_version(store, "smoke", "vpmoe", sha256_json(later)) is None, "the code changed again"
    assert accepted_version(store, "smoke", "vpmoe_stage1", fingerprint) is None
    assert accepted_version(store, "other", "vpmoe", fingerprint) is None, "it holds in its own experiment"


def test_the_statement_says_what_it_covers(store, record):
    payload = identity(
        sources=edited(helper="3" * 64),
        recipe={**RECIPE, "steps": 9},
        packages={"numpy": "2.6.0", "pyarrow": "26"},
    )
    named = Named(["steps"], ["numpy", "pyarrow"])
    body = accept(store, record, payload, named=named).body
    assert body["fingerprint"] == sha256_json(payload)
    assert (body["own"], body["digest"]) == (record.fingerprint, record.digest)
    assert body["code"] == sha256_json(payload["sources"])
    assert (body["recipe"], body["packages"]) == (sha256_json(payload["recipe"]), payload["packages"])
    assert body["shown_by"] == SHOWN
    assert Difference.from_json(body["difference"]).lines() == [
        "code added: trainer/helper.py",
        "recipe steps 8 → 9",
        "package numpy 2.5.5 → 2.6.0",
        "package pyarrow (absent) → 26",
    ]


@pytest.mark.parametrize(
    ("payload", "named", "message"),
    [
        (identity(), Named(), "nothing to accept"),
        (identity(recipe={**RECIPE, "steps": 9}), Named(), "recipe differ: steps 8 → 9.*--recipe steps"),
        (
            identity(recipe={**RECIPE, "optimizer": {"lr": 0.002, "betas": [0.9, 0.99]}}),
            Named(["optimizer.lr"]),
            r"recipe differ: optimizer.betas \[0.9,0.95\] → \[0.9,0.99\]",
        ),
        (identity(recipe={"steps": 8}), Named(["optimizer"]), "--recipe optimizer does not differ"),
        (RENAMED, Named(["steps"]), "--recipe steps does not differ; what does: nothing"),
        (identity(packages={"numpy": "3"}), Named(), "packages differ: numpy 2.5.5 → 3.*--package numpy"),
        (
            identity(packages={}),
            Named([], ["pyarrow"]),
            "--package pyarrow does not differ",
        ),
        (
            {**identity(), "inputs": {"synth": "9" * 64}},
            Named(),
            r"not the present ones \(synth \(absent\) → 9{12}\)",
        ),
        ({**identity(), "schema": "vpmoe.fingerprint/3"}, Named(), "neither code, recipe nor package"),
    ],
)
def test_an_acceptance_is_refused_for_what_it_does_not_cover(store, record, payload, named, message):
    with pytest.raises(StatementError, match=message):
        accept(store, record, payload, named=named)
    assert store.statements.about(record) == ()


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_an_acceptance_without_a_reason_is_refused(store, record, reason):
    with pytest.raises(StatementError, match="--because"):
        accept(store, record, reason=reason)


def test_accepting_twice_is_refused_and_another_code_is_another_acceptance(store, record):
    first = accept(store, record)
    with pytest.raises(StatementError, match=f"accepted already by .* \\({first.id[:12]}\\)"):
        accept(store, record)
    second = accept(store, record, identity(sources=edited(helper="4" * 64)))
    assert Difference.from_json(second.body["difference"]).sources == (
        Change("trainer/helper.py", None, "4" * 64),
    ), "from the record's own code, not from what was accepted before"
    assert active_acceptance(record, store.statements, sha256_json(RENAMED)).statement == first


def test_an_acceptance_is_never_chained(store, record):
    """Two harmless edits, one after the other: the second is compared with the record's own code."""
    accept(store, record, identity(sources=edited(**{"model/gpt": "5" * 64})))
    both = identity(sources=edited(**{"model/gpt": "5" * 64, "train/run": "6" * 64}))
    difference = Difference.from_json(accept(store, record, both).body["difference"])
    assert [change.name for change in difference.sources] == ["trainer/model/gpt.py", "trainer/train/run.py"]


# How it ends.


def test_a_withdrawn_acceptance_counts_no_more_and_can_be_given_again(store, record):
    written = accept(store, record)
    (found,) = acceptances_of(record, store.statements)
    with pytest.raises(StatementError, match="--because"):
        withdrawing(found, reason="")
    store.statements.append(withdrawing(found, reason="it was no renaming"))
    assert accepted_version(store, "smoke", "vpmoe", written.body["fingerprint"]) is None
    (found,) = acceptances_of(record, store.statements)
    with pytest.raises(StatementError, match=r"was withdrawn by .* already"):
        withdrawing(found, reason="once more")
    again = accept(store, record)
    assert again.id != written.id
    assert accepted_version(store, "smoke", "vpmoe", written.body["fingerprint"])[1].statement.id == again.id


def test_making_it_with_what_was_accepted_proves_it_or_voids_it(store, record):
    written = accept(store, record)
    (stated,) = settle_acceptances(store, made(store, "vpmoe", RENAMED, b"weights"))
    assert (stated.kind, stated.author, stated.body["statement"]) == ("reproduced", "vpmoe", written.id)
    (found,) = acceptances_of(record, store.statements)
    assert found.active
    assert settle_acceptances(store, store.find("smoke", "vpmoe")) == [], "said once"
    differs = made(store, "vpmoe", RENAMED, b"other weights")
    (stated,) = settle_acceptances(store, differs)
    assert (stated.kind, stated.body["digest"]) == ("refuted", differs.digest)
    assert stated.body["by"] == f"smoke/vpmoe/{differs.version}"
    assert active_acceptance(record, store.statements, sha256_json(RENAMED)) is None
    with pytest.raises(StatementError, match=r"is different .*what is refuted cannot be accepted"):
        accept(store, record)


def test_an_acceptance_of_a_record_that_is_gone_is_still_held_against_what_is_made(store, record):
    accept(store, record)
    shutil.rmtree(store.directory(record))
    (stated,) = settle_acceptances(store, made(store, "vpmoe", RENAMED, b"other"))
    assert (stated.kind, stated.record) == ("refuted", record.record_digest)
    assert [s.kind for s in store.statements.of_asset("smoke", "vpmoe")[record.record_digest]] == [
        "accepted",
        "refuted",
    ]


def test_what_was_withdrawn_is_held_against_what_is_made_too(store, record):
    accept(store, record)
    (found,) = acceptances_of(record, store.statements)
    store.statements.append(withdrawing(found, reason="not sure"))
    assert [s.kind for s in settle_acceptances(store, made(store, "vpmoe", RENAMED, b"other"))] == ["refuted"]
    (found,) = acceptances_of(record, store.statements)
    assert found.ended.kind == "refuted"


def test_other_code_or_another_asset_settles_nothing(store, record):
    accept(store, record)
    assert settle_acceptances(store, made(store, "vpmoe", identity(sources={}), b"other")) == []
    assert settle_acceptances(store, made(store, "vpmoe_stage1", RENAMED, b"other")) == []
    assert active_acceptance(record, store.statements, sha256_json(RENAMED))


def test_a_damaged_artifact_does_not_count(store, record):
    accept(store, record)
    path = store.payload(record) / "data.bin"
    path.chmod(0o644)
    path.write_bytes(b"WEIGHTS")
    assert accepted_version(store, "smoke", "vpmoe", sha256_json(RENAMED)) is None


# A version that was made the latest once more has a record of its own.


def origin(record: Record) -> Origin:
    return Origin(
        experiment=record.experiment,
        asset=record.asset,
        version=record.version,
        record_digest=record.record_digest,
    )


def test_an_acceptance_holds_for_the_same_files_made_the_latest_once_more(store, record):
    written = accept(store, record)
    made(store, "vpmoe", identity(recipe={}), b"of another recipe")
    again = made(store, "vpmoe", identity(), original=origin(record))
    found, by = accepted_version(store, "smoke", "vpmoe", sha256_json(RENAMED))
    assert (found.version, by.statement.id) == (again.version, written.id)
    with pytest.raises(StatementError, match="accepted already"):
        accept(store, again)


def test_an_acceptance_does_not_hold_for_the_same_files_in_another_experiment(store, record):
    accept(store, record)
    payload = identity()
    with store.work_area("variant", "vpmoe", sha256_json(payload)) as work:
        fill(work, {"data.bin": b"weights"})
        copy = store.publish(work, draft(payload, original=origin(record)))
    assert acceptances_of(copy, store.statements) == ()
    assert accepted_version(store, "variant", "vpmoe", sha256_json(RENAMED)) is None


def test_a_record_that_was_really_made_again_needs_its_own_acceptance(store, record):
    accept(store, record)
    again = made(store, "vpmoe", identity())
    assert again.digest == record.digest
    assert acceptances_of(again, store.statements) == ()


# Who hears of it.


@pytest.fixture
def family(store, record):
    """A child of an accepted artifact, its child, and a child made before anybody accepted."""
    before = made(store, "eval_vpmoe", identity((record,)), b"scores", inputs=(record.as_input(),))
    written = accept(store, record)
    child = made(
        store, "stage1", identity((record,)), b"trained", inputs=(record.as_input(acceptance=written.id),)
    )
    grandchild = made(store, "stage2", identity((child,)), b"more", inputs=(child.as_input(),))
    return written, before, child, grandchild


def lines(store: Store, record: Record) -> list[str]:
    return [remark.line() for remark in Remarks(store).about(record)]


def test_every_descendant_made_under_an_acceptance_names_it(store, record, family):
    written, before, child, grandchild = family
    for descendant in (child, grandchild):
        (line,) = lines(store, descendant)
        assert line == (
            f"made from vpmoe@{record.version}, accepted as the same by {written.author} on "
            f"{written.time[:10]} ({written.id[:12]}), because: a variable was renamed. It covers code "
            "added: trainer/helper.py"
        )
    assert lines(store, before) == [], "it was made when the artifact was up to date"
    (own,) = lines(store, record)
    assert own.startswith("accepted as the same by ")
    assert [r.asset for r in Remarks(store).made_under("smoke", written.id)] == ["stage1", "stage2"]


@pytest.mark.parametrize("how", ["withdrawn", "refuted"])
def test_descendants_of_what_nobody_stands_by_say_so(store, record, family, how):
    _, _, child, grandchild = family
    if how == "withdrawn":
        (found,) = acceptances_of(record, store.statements)
        store.statements.append(withdrawing(found, reason="no mere renaming"))
        told = "WITHDRAWN by "
    else:
        settle_acceptances(store, made(store, "vpmoe", RENAMED, b"different"))
        told = "REFUTED by smoke/vpmoe/"
    for descendant in (child, grandchild):
        (remark,) = Remarks(store).about(descendant)
        assert (remark.state, remark.void, remark.own) == (how, True, False)
        assert told in remark.line()
        assert remark.to_dict()["state"] == how


def test_what_was_withdrawn_and_came_out_the_same_misled_nobody(store, record, family):
    _, _, child, _ = family
    (found,) = acceptances_of(record, store.statements)
    store.statements.append(withdrawing(found, reason="to be sure"))
    settle_acceptances(store, made(store, "vpmoe", RENAMED))
    (remark,) = Remarks(store).about(child)
    assert (remark.state, remark.void) == ("reproduced", False)
    assert "Reproduced by smoke/vpmoe/" in remark.line()
    assert "WITHDRAWN by" in remark.line()


def test_descendants_hear_of_it_when_the_accepted_artifact_is_gone(store, record, family):
    _, _, child, _ = family
    shutil.rmtree(store.directory(record))
    (line,) = lines(store, child)
    assert "because: a variable was renamed" in line
    shutil.rmtree(store.statements.root)
    (line,) = lines(Store(store.root), child)
    assert line.endswith("which is NO LONGER IN THE STORE")


def test_a_child_of_the_accepted_that_is_itself_accepted_names_both(store, record, family):
    first, _, child, grandchild = family
    payload = identity((record,), sources=edited(helper="7" * 64))
    second = accept(store, child, payload, reason="a comma")
    assert [remark.statement for remark in Remarks(store).about(child)] == [second.id, first.id]
    newer = made(
        store, "stage2", identity((child,), recipe={}), b"x", inputs=(child.as_input(acceptance=second.id),)
    )
    assert {remark.statement for remark in Remarks(store).about(newer)} == {first.id, second.id}
    assert [remark.statement for remark in Remarks(store).about(grandchild)] == [first.id]


# Checks.


def test_only_a_check_without_a_verdict_can_be_let_pass(store):
    from tests.lineage.fabricate import state_verdict

    record = publish(store, "synth", blocking_checks=("rows", "sha256"))
    state_verdict(store, record, name="rows", passed=False, description="3 of 4")
    for check, message in (
        ("rows", r"check rows failed \(3 of 4\); a verdict is not waived"),
        ("colour", "has no check 'colour'; there is: rows, sha256"),
    ):
        with pytest.raises(StatementError, match=message):
            waiving(record, store.findings(record), check, reason="please")
    with pytest.raises(StatementError, match="--because"):
        waiving(record, store.findings(record), "sha256", reason=" ")
    waiver = store.statements.append(waiving(record, store.findings(record), "sha256", reason="seen"))
    assert [finding.check for finding in store.blocked_by(record)] == ["rows"]
    with pytest.raises(StatementError, match=r"let pass by .* already"):
        waiving(record, store.findings(record), "sha256", reason="again")
    store.statements.append(waiver.followed_by("withdrawn", {"statement": waiver.id}, reason="no"))
    assert [finding.check for finding in store.blocked_by(record)] == ["rows", "sha256"]
    state_verdict(store, record, name="rows", passed=True)
    with pytest.raises(StatementError, match="passed; there is nothing to waive"):
        waiving(record, store.findings(record), "rows", reason="please")


# Differences.

_keys = st.text('ab."', max_size=3)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _keys,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=6,
)
_recipes = st.dictionaries(_keys, _values, max_size=4)


@given(old=_recipes, new=_recipes)
def test_two_recipes_have_no_difference_if_and_only_if_they_are_the_same(old, new):
    found = recipe_changes(old, new)
    assert bool(found) == (sha256_json(old) != sha256_json(new))
    assert recipe_changes(old, old) == ()
    backwards = tuple(Change(change.name, change.new, change.old) for change in found)
    assert recipe_changes(new, old) == backwards


@given(old=_recipes, new=_recipes)
def test_a_difference_reads_back_from_a_statement(old, new):
    found = Difference.between({"recipe": old, "sources": SOURCES}, {"recipe": new, "packages": PACKAGES})
    assert Difference.from_json(found.to_json()) == found
    assert acceptances([]) == ()
