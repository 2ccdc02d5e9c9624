"""The command as its users meet it: output, JSON, exit codes, one-line errors."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from tests.lineage.fabricate import damage, draft, fill, publish, recipe
from tests.verbs import VERBS
from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.cli import main
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.statements import KINDS, Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources.process_record import Orchestrator, ProcessRecord

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ACCEPTED = dict.fromkeys(KINDS["accepted"], "f" * 64) | {
    "difference": {"sources": [], "recipe": [], "packages": []},
    "unknown": [],
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return Store(tmp_path / "artifacts")


@pytest.fixture
def chain(store):
    synth = publish(store, "synth", metrics={"rows": 12})
    check = {"name": "aligned", "passed": True, "blocking": True, "description": "3 arrays"}
    return synth, publish(store, "synth_kd_v1", (synth,), checks=[check])


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def fails(*arguments):
    """Run a command that must fail, and return its one line."""
    result = run(*arguments, code=1)
    assert isinstance(result.exception, SystemExit), "a traceback would have been shown"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.mark.parametrize("command", VERBS, ids=" ".join)
def test_every_command_has_help_with_examples_and_takes_json(command):
    text = run(*command, "--help").output
    assert "Example" in text
    assert f"vpmoe {' '.join(command)}" in text
    assert "--json" in text


def test_the_page_of_verbs_has_a_row_for_each_and_leads_to_where_it_is_described():
    rows = re.findall(
        r"^\| `vpmoe ([a-z -]+)` \|.*\[.*\]\((.*?)\) \|$", (DOCS / "verbs.md").read_text(), re.M
    )
    assert [verb for verb, _ in rows] == sorted(" ".join(words) for words in VERBS)
    for verb, link in rows:
        page, _, section = link.partition("#")
        text = (DOCS / page).read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not section or section in anchors, f"{verb}: {page} has no section {section}"
        assert f"vpmoe {verb}" in text, f"{page} says nothing of vpmoe {verb}"


def listed(*arguments):
    """The rows of `ls` for an experiment that no file describes: it compares records alone."""
    result = run("ls", "-e", "mine", "--json", *arguments)
    return {row["asset"]: row for row in json.loads(result.output)["artifacts"]}


def test_ls_shows_the_latest_version_of_every_asset_and_what_became_stale(store):
    synth = publish(store, "synth", experiment="mine")
    check = {"name": "aligned", "passed": True}
    publish(store, "synth_kd_v1", (synth,), experiment="mine", checks=[check])
    result = run("ls", "-e", "mine")
    assert result.stderr.startswith("not compared with present code and recipe: no experiment called 'mine'")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["ASSET", "VERSION", "DIGEST", "SIZE", "PUBLISHED", "CHECKS", "STATE"]
    assert lines[1].split()[:4] == ["synth", synth.version, synth.digest[:8], "309"]
    assert lines[2].split()[-2:] == ["1/1", "fresh"]
    newer = publish(store, "synth", files={"x": b"new"}, experiment="mine")
    rows = listed()
    assert (rows["synth"]["version"], rows["synth"]["state"]) == (newer.version, "fresh")
    assert rows["synth_kd_v1"]["text"] == f"stale: synth is now {newer.version}"


def test_ls_and_why_compare_with_present_code_and_recipe(store, chain):
    rows = {row["asset"]: row for row in json.loads(run("ls", "--json").output)["artifacts"]}
    assert rows["synth"]["state"] == "stale"
    assert {cause["kind"] for cause in rows["synth"]["causes"]} == {"recipe", "code", "package"}
    assert "not made yet: o200k_tokenizer, " in run("ls").output
    lines = run("why", "synth_kd_v1").output.splitlines()
    assert lines[0] == f"smoke/synth_kd_v1@{chain[1].version} is stale"
    assert "├─ recipe seq_len (absent) → 1024" in lines
    assert "├─ code added: vpmoe_assets/harmony/build.py" in lines
    answer = json.loads(run("why", "synth_kd_v1", "--json").output)
    assert {cause["kind"] for cause in answer["causes"]} >= {"recipe", "code", "package", "input_missing"}
    assert run("why", "vpmoe").output.splitlines()[0] == "smoke/vpmoe was never made"
    assert "did you mean vpmoe" in fails("why", "vpmo")
    assert "only the latest version" in fails("why", f"synth@{chain[0].version}")


def test_plan_says_what_a_run_would_do_and_what_that_takes(store, chain):
    lines = run("plan", "synth_kd_v1").output.splitlines()
    assert lines[0].split() == ["ASSET", "ACTION", "WHY", "TIME", "TOKENS", "MEMORY", "DISK"]
    assert "synth_harmony is not in the store, and not selected" in lines[1]
    assert lines[2] == "1 assets of smoke: 1 refused"
    answer = json.loads(run("plan", '+key:"smoke/synth_kd_v1"', "--json").output)
    rows = {row["asset"]: row for row in answer["assets"]}
    assert list(rows) == ["o200k_tokenizer", "synth", "synth_harmony", "synth_kd_v1"]
    assert {row["action"] for row in rows.values()} == {"build"}
    assert rows["synth"]["cost"]["seconds"] == 90.0
    assert answer["seconds_unknown"] == ["o200k_tokenizer", "synth_harmony"]
    assert 'The nearest key is "smoke/synth"' in fails("plan", 'key:"smoke/synt"')
    assert "--config-json is no JSON" in fails("plan", "--config-json", "{")
    wrong = '{"resources": {"trainer": {"config": {"device": "tpu"}}}}'
    assert "device" in fails("plan", "--config-json", wrong)


def test_new_writes_an_experiment_that_states_what_differs_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("vpmoe_assets.commands.new"), "directory", lambda: tmp_path)
    said = run(
        "new", "mine", "--set", "stages.vpmoe_stage1.steps=16", "--set", 'training.dtype="bf16"'
    ).output
    path = tmp_path / "mine.toml"
    assert said == f"{path} extends smoke; edit it, then: vpmoe plan -e mine\n"
    found = load_experiment(path)
    assert (found.name, found.stages.vpmoe_stage1.steps, found.training.dtype) == ("mine", 16, "bf16")
    assert json.loads(run("new", "wide", "--from", "full", "--json").output)["extends"] == "full"
    before = sorted(tmp_path.iterdir())
    assert "is there already" in fails("new", "mine")
    assert "did you mean 'smoke'" in fails("new", "other", "--from", "smok")
    assert "the nearest valid key is 'steps'" in fails("new", "other", "--set", "stages.vpmoe_stage1.step=16")
    assert "a text is quoted for TOML" in fails("new", "other", "--set", "training.dtype=bf16")
    assert "expected KEY=VALUE" in fails("new", "other", "--set", "training.dtype")
    assert "is no name" in fails("new", "../other")
    assert sorted(tmp_path.iterdir()) == before


def test_ls_shows_damage_blocked_checks_and_unreadable_records(store):
    synth = publish(store, "synth", experiment="mine")
    (store.payload(synth) / "data.bin").unlink()
    failed = {"name": "sha256", "passed": False, "blocking": True}
    publish(store, "blocked", experiment="mine", checks=[failed])
    broken = publish(store, "broken", experiment="mine")
    path = store.directory(broken) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{")
    result = run("ls", "-e", "mine")
    assert "damaged: payload/data.bin missing" in result.stdout
    assert "blocked: check sha256" in result.stdout
    assert f"unreadable: broken@{broken.version}" in result.stderr


def test_lineage_shows_both_ways_and_by_whose_word_something_counted(store, chain):
    synth, kd = chain
    accepted = store.statements.append(Statement.about(synth, "accepted", ACCEPTED, reason="renamed"))
    trained = publish(store, "trained", (synth, kd), accepted={"synth": accepted.id}, metrics={"loss": 2.5})
    lines = run("lineage", "trained").output.splitlines()
    assert lines[0].startswith(f"trained@{trained.version}  {trained.digest[:8]}  ")
    assert lines[0].endswith("  loss 2.5")
    assert lines[1].startswith(f"├─ synth@{synth.version}")
    assert lines[2].startswith("│  ! made from synth@")
    assert "because: renamed" in lines[2]
    assert lines[3].startswith(f"└─ synth_kd_v1@{kd.version}")
    assert lines[4].startswith("   └─ synth@")
    assert lines[4].endswith("  (see above)")
    assert lines[-1] == "nothing was made from it"
    down = run("lineage", "synth", "--down", "--depth", "1").output
    names = [line.lstrip("│├└─ ").partition("@")[0] for line in down.splitlines() if "!" not in line]
    assert names == ["synth", "synth_kd_v1", "trained", "trained"]
    told = json.loads(run("lineage", "synth", "--json").output)
    assert [len(node["remarks"]) for node in told["nodes"]] == [1, 0, 0]
    assert {edge["acceptance"] for edge in told["edges"]} == {None, accepted.id}


def test_lineage_tells_of_a_version_that_is_gone(store, chain):
    synth, kd = chain
    shutil.rmtree(store.directory(synth))
    assert "NOT IN THE STORE" in run("lineage", "synth_kd_v1").output
    told = json.loads(run("lineage", f"synth@{synth.version}", "--json").output)
    assert [(node["asset"], node["state"]) for node in told["nodes"]] == [
        ("synth", "gone"),
        ("synth_kd_v1", "present"),
    ]
    assert told["nodes"][1]["record_digest"] == kd.record_digest
    assert "smoke/synth is not in" in fails("lineage", "synth")
    assert "synth@1 is not in" in fails("lineage", "synth@1")


@pytest.mark.parametrize(
    ("form", "begins"), [("mermaid", "flowchart TD"), ("openlineage", '{"eventTime":'), ("svg", "<svg ")]
)
def test_lineage_is_written_in_the_forms_that_others_read(store, chain, tmp_path, form, begins):
    assert run("lineage", "synth", "--format", form).output.startswith(begins)
    file = tmp_path / "out"
    assert run("lineage", "synth", "--format", form, "-o", str(file)).output == f"2 artifacts in {file}\n"
    assert file.read_text().startswith(begins)
    assert "lies in the store" in fails("lineage", "synth", "-o", str(store.root / "x"))
    assert "is a directory" in fails("lineage", "synth", "-o", str(tmp_path))


def test_an_index_of_another_version_is_made_again_with_a_word(store, chain):
    index = Index(store.root / "index.duckdb")
    index.rebuild(store)
    with duckdb.connect(index.path) as database:
        database.execute("UPDATE meta SET schema_version = 2")
    result = run("sql", "SELECT count(*) AS n FROM artifacts")
    assert result.stdout.split() == ["n", "2"]
    assert "of another version" in result.stderr
    assert run("sql", "SELECT count(*) AS n FROM artifacts").stderr == ""


def test_ls_of_an_empty_store_says_so(store):
    assert "no artifacts of experiment smoke" in run("ls").output
    assert json.loads(run("ls", "-e", "full", "--json").output)["artifacts"] == []


def test_experiments_come_from_the_option_the_environment_a_file_or_the_asset_key(
    store, tmp_path, monkeypatch
):
    record = publish(store, "synth", experiment="full")
    expected = f"{store.payload(record)}\n"
    assert "smoke/synth" in fails("path", "synth")
    assert run("path", "synth", "-e", "full").output == expected
    assert run("path", "full/synth").output == expected
    monkeypatch.setenv("VPMOE_EXPERIMENT", "full")
    assert run("path", "synth").output == expected
    toml = tmp_path / "mine.toml"
    toml.write_text((ROOT / "configs" / "smoke.toml").read_text().replace('name = "smoke"', 'name = "full"'))
    monkeypatch.setenv("VPMOE_EXPERIMENT", str(toml))
    assert run("path", "synth").output == expected
    toml.write_text("name = 1")
    assert fails("path", "synth")


def test_show_tells_how_an_artifact_was_made_and_what_it_came_from(store, chain):
    synth, kd = chain
    text = run("show", "synth_kd_v1").output
    for part in (
        kd.digest,
        kd.record_digest,
        kd.fingerprint,
        "a" * 40,
        "device=cpu",
        "passed",
        "aligned (version 111111111111): 3 arrays",
    ):
        assert part in text
    assert f"└─ synth@{synth.version}  {synth.digest[:8]}" in text
    answer = json.loads(run("show", f"synth_kd_v1@{kd.version}", "--json").output)
    assert answer["record"]["record_digest"] == kd.record_digest
    assert answer["record"]["inputs"][0]["record_digest"] == synth.record_digest
    assert [(n["depth"], n["asset"], n["present"]) for n in answer["ancestry"]] == [
        (0, "synth_kd_v1", True),
        (1, "synth", True),
    ]
    assert "rows = 12" in run("show", "synth").output


def test_an_unknown_asset_or_version_is_answered_with_what_there_is(store, chain):
    assert "there is: synth, synth_kd_v1" in fails("show", "synht")
    assert chain[0].version in fails("show", "synth@20000101.1-00000000")
    assert "no name" in fails("show", "..")


def test_path_is_one_line_for_a_shell_and_refuses_what_nothing_may_be_built_on(store, chain):
    assert run("path", "synth").stdout == f"{store.payload(chain[0])}\n"
    assert json.loads(run("path", "synth", "--json").output)["digest"] == chain[0].digest
    damage(store.payload(chain[0]) / "data.bin")
    assert "payload/data.bin" in fails("path", "synth")
    assert run("path", "synth", "--unchecked").stdout == f"{store.payload(chain[0])}\n"


def test_verify_names_each_bad_file_and_exits_with_1(store, chain):
    assert "2 artifacts verified: all intact" in run("verify").output
    damage(store.payload(chain[0]) / "data.bin")
    for arguments in (["verify"], ["verify", "synth_kd_v1"]):
        result = run(*arguments, code=1)
        assert f"smoke/synth/{chain[0].version}/payload/data.bin: sha256" in result.stdout
        assert "2 artifacts verified: 1 problem" in result.stderr
    answer = json.loads(run("verify", "--json", code=1).output)
    assert [p["path"] for p in answer["problems"]] == ["payload/data.bin"]
    run("verify", "--quick")


def test_verify_names_the_link_that_is_broken_first_and_what_was_made_from_it(store, chain):
    damage(store.payload(chain[0]) / "data.bin")
    told = run("verify", code=1).stdout.splitlines()[-1]
    names = [f"smoke/{each.asset}/{each.version}" for each in chain]
    assert told == f"first broken link: {names[0]} (payload/data.bin: content); made from it: {names[1]}"
    (link,) = json.loads(run("verify", "--json", code=1).output)["broken"]
    assert (link["artifact"], link["below"]) == (names[0], [names[1]])


def test_verify_reads_again_what_was_written_to_and_deep_reads_everything(store, chain, monkeypatch):
    from vpmoe_assets.lineage import hashcache, treestate

    read = []
    real = hashcache.hash_files
    monkeypatch.setattr(hashcache, "hash_files", lambda files: read.extend(files) or real(files))
    for module in (hashcache, treestate):  # their times need not grow old to be trusted
        monkeypatch.setattr(module, "settled", lambda known, **options: True)
    run("verify")
    read.clear()
    run("verify")
    assert read == []
    damage(store.payload(chain[0]) / "data.bin")
    run("verify", code=1)
    assert [path.name for path in read] == ["data.bin"]
    damage(store.payload(chain[0]) / "data.bin")
    read.clear()
    answer = json.loads(run("verify", "--deep", "--without-checks", "synth", "synth_kd_v1", "--json").output)
    assert (answer["artifacts"], answer["problems"]) == (2, [])
    assert len(read) == 4
    assert "DAGSTER_HOME" in answer["notes"][-1]["message"], "who could not be asked is said"
    assert not list((store.root / ".work").glob("verifying-*")), "what it had read is no news to the next"


def test_a_deep_verification_that_was_interrupted_goes_on_and_does_not_read_twice(store, chain, monkeypatch):
    from vpmoe_assets.lineage import hashcache

    read = []
    real = hashcache.hash_files

    def interrupted(files):
        if read:
            raise KeyboardInterrupt
        read.extend(files)
        return real(files)

    monkeypatch.setattr(hashcache, "settled", lambda known, **options: True)
    monkeypatch.setattr(hashcache, "hash_files", interrupted)
    run("verify", "--deep", "--without-checks", code=1)
    first, read = read, []
    monkeypatch.setattr(hashcache, "hash_files", lambda files: read.extend(files) or real(files))
    again = run("verify", "--deep", "--without-checks")
    assert "going on from a verification that was interrupted" in again.stderr
    assert first
    assert not {*first} & {*read}
    run("verify", "--deep", "--without-checks")
    assert {*first} <= {*read}, "the next one begins anew"


def test_verify_refuses_options_that_belong_to_another(store, chain):
    assert "--deep reads all" in fails("verify", "--deep", "--quick")
    assert "belongs to --deep" in fails("verify", "--restart")


def test_a_version_that_is_gone_is_named_until_somebody_says_that_it_was_removed_on_purpose(store, chain):
    run("index", "rebuild")
    name = f"synth_kd_v1@{chain[1].version}"
    assert "still in" in fails("forget", name, "--because", "x")
    shutil.rmtree(store.directory(chain[1]))
    assert f"vpmoe forget {name}" in run("verify", code=1).stdout
    assert "nobody remembers" in fails("forget", "synth_kd_v1@20000101.1-00000000", "--because", "x")
    assert "removed on purpose" in run("forget", name, "--because", "an early trial").output
    assert "all intact" in run("verify").output
    assert json.loads(run("forget", name, "--because", "again", "--json").output)["statements"] == []
    (said,) = store.statements.about(chain[1])[-1:]
    assert (said.kind, said.reason) == ("collected", "an early trial")


def test_verify_reports_a_record_that_cannot_be_read(store, chain):
    path = store.directory(chain[1]) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{}")
    assert "schema" in run("verify", code=1).stdout


def test_sql_prints_a_table_or_json_and_refuses_to_write(store, chain):
    assert "vpmoe index rebuild" in fails("sql", "SELECT 1")
    assert run("index", "rebuild").output.startswith("2 artifacts in ")
    question = "SELECT asset, bytes, published_utc FROM latest ORDER BY asset"
    lines = run("sql", question).output.splitlines()
    assert lines[0].split() == ["asset", "bytes", "published_utc"]
    assert lines[1].split()[:2] == ["synth", "309"]
    rows = json.loads(run("sql", question, "--json").output)
    assert [(row["asset"], row["bytes"]) for row in rows] == [("synth", 309), ("synth_kd_v1", 309)]
    assert "only SELECT" in fails("sql", "DROP TABLE artifacts")
    assert "syntax error" in fails("sql", "SELEC")


def test_index_rebuild_names_records_that_it_had_to_leave_out(store, chain):
    path = store.directory(chain[1]) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{}")
    result = run("index", "rebuild", code=1)
    assert str(path) in result.stderr
    answer = json.loads(run("index", "rebuild", "--json", code=1).output)
    assert answer["artifacts"] == 1
    assert answer["digest"] == Index(store.root / "index.duckdb").digest()


def test_reap_of_a_quiet_store_finds_nothing(store):
    assert run("reap").output == "nothing to reap\n"
    assert json.loads(run("reap", "--json").output) == []


def test_a_job_of_another_host_is_named_and_let_go_of_when_that_host_is_gone(store):
    work = store.root / ".work" / "smoke" / "vpmoe_stage1-01234567"
    work.mkdir(parents=True)
    elsewhere = Orchestrator(1, 0.0, host="node-17", boot="b")
    ProcessRecord("marker", elsewhere, (), "vpmoe_stage1", None, death_signal=True).write(work)
    assert "vpmoe_stage1: runs or ran on host node-17" in run("reap").output
    assert "other hosts on record: node-17" in fails("reap", "--host-gone", "node-7")
    assert "is this machine" in fails("reap", "--host-gone", socket.gethostname())
    assert run("reap", "--host-gone", "node-17").output.startswith("vpmoe_stage1: ended 0 processes")
    assert run("reap").output == "nothing to reap\n"


# data build.


def test_reports_exports_the_newest_evaluations_of_an_experiment(store, tmp_path):
    fails("reports", "--output", str(tmp_path / "none"))
    for experiment, score in (("smoke", 1), ("smoke", 2), ("other", 3)):
        report = {"checkpoint_id": "vpmoe", "config": {}, "score": score}
        content = {"vpmoe.json": json.dumps(report).encode()}
        files = {**content, "vpmoe.items.jsonl": b""}
        publish(store, "eval_vpmoe", experiment=experiment, files=files, run=content)
    answer = json.loads(run("reports", "--output", str(tmp_path / "reports"), "--json").stdout)
    path = tmp_path / "reports" / "eval" / "core8" / "vpmoe.json"
    assert answer == {"experiment": "smoke", "written": [str(path)]}
    exported = json.loads(path.read_bytes())
    assert (exported["score"], exported["config"], exported["delta"]) == (2, {"config": "smoke"}, None)


@pytest.fixture
def accepted(store):
    """An evaluation of a checkpoint that a person had accepted, and the acceptance."""
    vpmoe = publish(store, "vpmoe")
    body = {
        **dict.fromkeys(("own", "fingerprint", "code", "recipe", "digest"), "1" * 64),
        **{"files_of": vpmoe.record_digest, "packages": {}, "inputs": {}, "shown_by": {}, "unknown": []},
        "difference": {"sources": [{"name": "trainer/a.py", "old": "1", "new": "2"}]},
    }
    said = store.statements.append(Statement.about(vpmoe, "accepted", body, reason="a name", author="ann@x"))
    report = {"vpmoe.json": json.dumps({"checkpoint_id": "vpmoe", "config": {}}).encode()}
    fingerprint, payload = recipe("eval_vpmoe", (vpmoe,))
    with store.work_area("smoke", "eval_vpmoe", fingerprint) as work:
        fill(work, {**report, "vpmoe.items.jsonl": b""})
        (work.path / "vpmoe.json").write_bytes(report["vpmoe.json"])
        named = (vpmoe.as_input(acceptance=said.id),)
        store.publish(work, draft(payload).model_copy(update={"inputs": named}))
    return said


def test_every_view_of_lineage_names_what_a_person_accepted(store, accepted, tmp_path):
    told = "as the same by ann@x on "
    difference = "because: a name. It covers code changed: trainer/a.py"
    for asset in ("vpmoe", "eval_vpmoe"):
        text = run("show", asset).output
        assert told in text
        assert difference in text
        assert accepted.id[:12] in text
    answer = json.loads(run("show", "eval_vpmoe", "--json").output)
    assert [remark["statement"] for remark in answer["remarks"]] == [accepted.id]
    assert answer["ancestry"][1]["remark"]["state"] == "active"
    lines = {line.split()[0]: line for line in run("ls").output.splitlines()}
    assert lines["vpmoe"].endswith("; accepted (active)")
    assert lines["eval_vpmoe"].endswith("; vpmoe was accepted (active)")
    run("reports", "--output", str(tmp_path / "reports"))
    exported = json.loads((tmp_path / "reports" / "eval" / "core8" / "vpmoe.json").read_bytes())
    (remark,) = exported["accepted"]
    assert (remark["artifact"].split("/")[1], remark["author"], remark["reason"]) == (
        "vpmoe",
        "ann@x",
        "a name",
    )
    assert difference in remark["text"]
    run("index", "rebuild")
    question = "SELECT asset, author, reason, in_force FROM acceptances"
    assert json.loads(run("sql", question, "--json").output) == [
        {"asset": "vpmoe", "author": "ann@x", "reason": "a name", "in_force": True}
    ]
    rows = json.loads(run("sql", "SELECT asset, acceptances FROM ancestry", "--json").output)
    assert rows == [{"asset": "eval_vpmoe", "acceptances": [accepted.id]}]


def test_accept_lists_what_was_said_and_withdraws_it_by_the_first_digits(store, accepted):
    (row,) = json.loads(run("accept", "--list", "--json").output)
    assert (row["what"], row["state"], row["statement"]) == ("code and recipe", "active", accepted.id)
    assert accepted.id[:12] in run("accept", "--list").output
    assert "nothing was accepted" in run("accept", "--list", "-e", "full").output
    assert "say why it is withdrawn" in fails("accept", "--withdraw", accepted.id[:8])
    told = run("accept", "--withdraw", accepted.id[:8].upper(), "--because", "it was not").output
    assert "made meanwhile from it: eval_vpmoe@" in told
    assert "vpmoe was accepted (withdrawn)" in run("ls").output
    assert "WITHDRAWN by" in run("show", "eval_vpmoe").output
    assert json.loads(run("accept", "--list", "--json").output)[0]["state"] == "withdrawn"
    run("index", "rebuild")
    assert json.loads(run("sql", "SELECT in_force FROM acceptances", "--json").output) == [
        {"in_force": False}
    ]


def test_accept_lets_a_check_without_evidence_pass(store):
    publish(store, "synth", blocking_checks=("rows",))
    assert "blocked: check rows" in run("ls").output
    assert "vpmoe accept synth --check rows --because TEXT" in fails("path", "synth")
    said = json.loads(run("accept", "synth", "--check", "rows", "--because", "I counted", "--json").output)
    assert run("path", "synth").stdout
    assert "let pass by" in run("show", "synth").output
    assert [row["what"] for row in json.loads(run("accept", "--list", "--json").output)] == ["check rows"]
    run("accept", "--withdraw", said["id"][:10], "--because", "I miscounted")
    assert "rows" in fails("path", "synth")
    assert "withdrawn" in run("accept", "--list").output


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two parquet files in the public shape, without the optional columns and with one too many."""
    directory = tmp_path_factory.mktemp("rows")
    for part in range(2):
        numbers = range(part * 15, part * 15 + 15)
        table = {
            "synth_id": [f"row-{n}" for n in numbers],
            "query": [f"What is {n} + {n}?" for n in numbers],
            "synthetic_reasoning": [f"{n} + {n} = {2 * n}." for n in numbers],
            "synthetic_answer": [str(2 * n) for n in numbers],
            "surplus": list(numbers),
        }
        pq.write_table(pa.table(table), directory / f"part-{part}.parquet")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.[bi][id][nx]")}


def test_data_build_gives_the_same_bytes_however_it_is_asked(rows, tmp_path):
    shared = ["--valid-fraction", "0.2", "--shards", "2"]
    answer = json.loads(
        run("data", "build", "--input", str(rows), "--output", str(tmp_path / "a"), *shared, "--json").stdout
    )
    assert sum(split["rows"] for split in answer["splits"].values()) == 30
    assert json.loads(Path(answer["manifest"]).read_text())["git_sha"]
    one = contents(tmp_path / "a")
    assert any(name.startswith("train/") for name in one)
    assert any(name.startswith("valid/") for name in one)

    files = ["--input", str(rows / "part-0.parquet"), "--input", str(rows / "part-[1-9].parquet")]
    for shard in ("1", "0"):
        only = ["--valid-fraction", "0.2", "--shard", shard, "--of", "2"]
        run("data", "build", *files, "--output", str(tmp_path / "c"), *only)
        assert not (tmp_path / "c").exists()
    last = run("data", "build", *files, "--output", str(tmp_path / "c"), *shared)
    assert "2 shards were finished by an earlier run" in last.stdout
    assert contents(tmp_path / "c") == one


def test_data_build_refuses_what_it_cannot_use_in_one_line(rows, tmp_path):
    output = str(tmp_path / "out")
    assert "no file at" in fails("data", "build", "--input", "absent.parquet", "--output", output)
    (tmp_path / "empty").mkdir()
    assert "no *.parquet" in fails("data", "build", "--input", str(tmp_path / "empty"), "--output", output)
    (tmp_path / "bad.parquet").write_bytes((rows / "part-0.parquet").read_bytes()[:100])
    assert "bad.parquet" in fails(
        "data", "build", "--input", str(tmp_path / "bad.parquet"), "--output", output
    )
    deep = str(tmp_path / "not" / "there" / "out")
    fails("data", "build", "--input", str(rows), "--output", deep, "--seq-len", "0")
    none = run("data", "build", "--input", str(rows), "--output", deep, "--max-rows", "0", code=1).stderr
    assert "no conversation is left to write" in none.splitlines()[-1]
    fails("data", "build", "--input", str(rows), "--output", deep, "--shards", "0")
    bad = str(tmp_path / "bad.parquet")
    fails("data", "build", "--input", bad, "--output", deep, "--shard", "0", "--of", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.parquet",
        "empty",
    ]  # nothing left beside it
    Path(output).mkdir()
    (Path(output) / "mine").write_text("keep")
    assert "not empty" in fails("data", "build", "--input", str(rows), "--output", output)
    assert (Path(output) / "mine").read_text() == "keep"
    for wrong in (["--shard", "0"], ["--shard", "2", "--of", "2"], ["--workers", "0"]):
        run("data", "build", "--input", str(rows), "--output", output, *wrong, code=2)


# The real thing.


def test_the_installed_command_answers_in_a_shell(store, chain):
    command = [Path(sys.executable).with_name("vpmoe")]
    if not command[0].exists():
        command = [sys.executable, "-m", "vpmoe_assets.cli"]
    listed = subprocess.run(
        f'ls "$({" ".join(map(str, command))} path synth)"', shell=True, capture_output=True, text=True
    )
    assert listed.stdout.split() == ["data.bin", "sub"], listed.stderr
    refused = subprocess.run([*command, "path", "nope"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("Error: ")
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ("dagster", "pyarrow", "duckdb", "pydantic", "filelock", "torch", "rich")),
        (["ls"], ("dagster", "pyarrow", "duckdb", "torch", "numpy", "rich")),
    ],
)
def test_start_up_loads_nothing_that_the_answer_does_not_need(store, chain, arguments, absent):
    run("ls")  # from now on it is remembered what present code would make
    program = (
        "import sys\nfrom vpmoe_assets.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in {absent} if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.splitlines()[-1] == "LOADED []", result.stderr


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_a_store_that_is_no_directory_is_named(tmp_path, monkeypatch, kind):
    place = tmp_path / "place"
    place.touch() if kind == "file" else place.symlink_to(place)
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(place))
    for verb in (["ls"], ["path", "synth"], ["sql", "SELECT 1"], ["index", "rebuild"]):
        assert f"VPMOE_ARTIFACTS = {place} is a" in fails(*verb)


def test_a_question_to_a_store_that_is_not_there_makes_none(store):
    run("ls")
    assert not store.root.exists()


@pytest.mark.parametrize("inside", ["", "smoke/mine"])
def test_nothing_is_written_into_the_store_by_name(store, chain, tmp_path, inside):
    link = tmp_path / "link"
    link.symlink_to(store.root)
    for verb in (["reports"], ["data", "build", "--input", "rows.parquet"]):
        assert "lies in the store" in fails(*verb, "--output", str(link / inside))
    assert not (store.root / "smoke" / "mine").exists()


def test_columns_of_one_name_and_values_without_a_form_in_json_are_all_there(store, chain):
    Index(store.root / "index.duckdb").rebuild(store)
    asked = "SELECT 1 AS a, 2 AS a, 3 AS a_1, 'NaN'::DOUBLE AS x, '-inf'::FLOAT AS y, 9007199254740993 AS n"
    (row,) = json.loads(run("sql", asked, "--json").output, parse_constant=pytest.fail)
    assert row == {"a": 1, "a_2": 2, "a_1": 3, "x": "NaN", "y": "-Infinity", "n": 9007199254740993}
    assert "not UTF-8 at character 9" in fails("sql", "SELECT 1\udcff")


def test_what_an_error_repeats_of_the_command_line_holds_no_credential():
    assert "'https://[redacted]@host/x'" in run("https://me:swordfish-9@host/x", code=2).output
