"""What `vpmoe rerun` takes for making an artifact again, refuses, and states; the run itself stands in."""

import shutil
import sys
from dataclasses import replace

import pytest

from tests.lineage.fabricate import damage, publish, state_verdict
from vpmoe_assets.codebase.snapshot import pack
from vpmoe_assets.lineage import rerunning
from vpmoe_assets.lineage.acceptance import acceptances_of
from vpmoe_assets.lineage.errors import ArtifactDamaged, ArtifactMissing, LineageError, ProvenanceError
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.own_store import OwnStore
from vpmoe_assets.lineage.record import Objects
from vpmoe_assets.lineage.rerunning import RerunError, kept_packages, original_of, rerun, state
from vpmoe_assets.lineage.surroundings import Surroundings

PACKAGES = [{"name": "pyarrow", "version": "21.0.0", "record_sha256": None}]


@pytest.fixture
def kept(store):
    objects = ObjectStore(store.root)
    return Objects(
        sources=objects.put(pack({"trainer/x.py": b"x = 1\n"}), "sources"),
        experiment=objects.put(b'name = "smoke"\n', "experiment"),
        run_config=objects.put_json(
            {"resources": {"trainer": {"config": {"dp": 2, "wandb": "online"}}}}, "x"
        ),
        packages=objects.put_json(PACKAGES, "packages"),
    )


@pytest.fixture
def chain(store, kept):
    synth = publish(
        store, "synth", manifest={"rows": 1}, checks=[{"name": "x", "passed": True}], objects=kept
    )
    return synth, publish(store, "synth_harmony", (synth,), objects=kept, recipe_keys={"a": 1})


@pytest.fixture
def own(tmp_path):
    return OwnStore.at(tmp_path / "own")


@pytest.fixture
def made_as(monkeypatch):
    """Let the run publish these files, in the store of its own, in the place of Dagster's command."""
    calls = []

    def use(files):
        def run(own, record, sources, python, configuration):
            calls.append((sources, configuration))
            parents = [own.store.require("smoke", each.asset) for each in record.inputs]
            publish(own.store, record.asset, tuple(parents), files=files, recipe_keys={"a": 1})

        monkeypatch.setattr(rerunning, "_run", run)
        return calls

    return use


def again(store, record, own):
    return rerun(store, record, own, python=None, present=None, log=lambda message: None)


def test_what_comes_out_the_same_is_stated_and_touches_no_published_file(store, chain, own, made_as):
    synth, harmony = chain
    calls = made_as(None)
    before = {path: path.lstat() for path in store.directory(synth).rglob("*")}
    outcome = again(store, harmony, own)
    assert outcome.reproduced
    assert outcome.same_identity
    assert {path: path.lstat() for path in before} == before
    ((sources, configuration),) = calls
    assert (sources / "trainer" / "x.py").read_bytes() == b"x = 1\n"
    assert configuration["resources"]["trainer"]["config"] == {"dp": 2, "wandb": "disabled"}
    said = state(store, outcome, [])
    assert (said.kind, said.record) == ("reproduced", harmony.record_digest)
    own.finish()
    own.remove()
    assert store.payload(synth).is_dir()


def test_what_comes_out_otherwise_is_stated_with_the_first_difference(store, chain, own, made_as):
    made_as({"data.bin": b"\x00\x01\x02" * 99 + b"\x00\x01\x03", "sub/odd name\n€.txt": "häßlich".encode()})
    outcome = again(store, chain[1], own)
    said = state(store, outcome, ["numpy 1 → 2"])
    assert (said.kind, said.body["environment"]) == ("not_reproduced", ["numpy 1 → 2"])
    assert said.body["difference"]["file"]["path"] == "data.bin"
    assert said.body["difference"]["file"]["what"] == "from byte 299 on"
    assert acceptances_of(chain[1], store.statements) == (), "it is no acceptance, and ends none"
    assert state(store, replace(outcome, made=chain[0]), []) is None, (
        "another recipe says nothing of this one"
    )


def test_what_fails_its_checks_is_compared_too(store, chain, own, monkeypatch):
    def run(own, record, *_):
        parent = own.store.require("smoke", "synth")
        check = {"name": "rows_there", "passed": False, "blocking": True}
        publish(own.store, record.asset, (parent,), files={"data.bin": b"other"}, checks=[check])
        raise RerunError("the run failed: Materialization failed")

    monkeypatch.setattr(rerunning, "_run", run)
    outcome = again(store, chain[1], own)
    assert (outcome.reproduced, outcome.failed) == (False, ("rows_there",))
    assert outcome.file.path == "data.bin"


def test_an_input_that_is_gone_is_stood_in_for_by_the_same_content(store, chain, own, made_as):
    made_as(None)
    synth = chain[0]
    twin = publish(store, "synth", manifest={"rows": 1}, experiment="full")
    assert twin.digest == synth.digest
    shutil.rmtree(store.directory(synth))
    said = []
    rerun(store, chain[1], own, python=None, present=None, log=said.append)
    assert [each.partition(";")[0] for each in said] == [f"input synth@{synth.version} is gone"]
    assert own.store.require("smoke", "synth").record_digest == synth.record_digest


def test_inputs_that_are_damaged_or_nowhere_are_named(store, chain, own):
    damage(store.payload(chain[0]) / "data.bin")
    with pytest.raises(ArtifactDamaged, match=r"its input synth@\S+ is damaged: payload/data.bin"):
        again(store, chain[1], own)
    shutil.rmtree(store.directory(chain[0]))
    with pytest.raises(ArtifactMissing, match=r"its input smoke/synth@.* materialise it again"):
        again(store, chain[1], own)


def test_an_input_that_is_blocked_is_blocked_there_too(store, chain, own, made_as):
    made_as(None)
    state_verdict(store, chain[0], name="y", passed=False)
    with pytest.raises(LineageError, match="blocked by its checks"):
        again(store, chain[1], own)


def test_what_repeats_another_is_made_again_as_that_one_was(store, chain):
    synth = chain[0]
    with store.work_area("full", "synth", synth.fingerprint) as work:
        link = store.renew(work, synth, inputs=[], blocking_checks=[], run=None)
    assert link.original is not None
    assert original_of(store, link).record_digest == synth.record_digest
    shutil.rmtree(store.root / ".records")
    with pytest.raises(RerunError, match="nothing to make it again from"):
        original_of(store, link)


def test_a_record_without_what_it_takes_is_refused(store):
    with pytest.raises(RerunError, match="were not kept"):
        kept_packages(store, publish(store, "synth"))


def test_a_directory_with_other_things_is_not_taken_and_an_unfinished_attempt_goes_on(tmp_path, own):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(LineageError, match="holds other things"):
        OwnStore.at(tmp_path / "mine")
    own.experiment.touch()
    (own.root / "half").touch()
    assert OwnStore.at(own.root).resumed
    assert (own.root / "half").exists()
    own.finish()
    assert not OwnStore.at(own.root).resumed
    assert not (own.root / "half").exists()


def test_other_packages_and_another_python_are_named(store, chain, tmp_path):
    here = Surroundings(
        tmp_path, "3.13.0", ({"name": "PyArrow", "version": "22.0.0"}, {"name": "new", "version": "1"})
    )
    listed = [*PACKAGES, {"name": "gone_by.now", "version": "3"}, {"name": "vpmoe", "version": "0"}]
    assert here.differences(chain[0], listed) == [
        "Python 3.12.1 → 3.13.0",
        "gone-by-now 3 → (absent)",
        "pyarrow 21.0.0 → 22.0.0",
    ]
    assert "installed here and not then: new" in here.remarks(chain[0], listed)
    same = Surroundings(tmp_path, "3.12.1", tuple(PACKAGES))
    assert same.differences(chain[0], PACKAGES) == []
    edited = Surroundings(tmp_path, "3.12.1", tuple(PACKAGES), {"pyarrow": ["pyarrow/ipc.py"], "new": ["x"]})
    assert edited.differences(chain[0], PACKAGES) == ["pyarrow 21.0.0, edited since: pyarrow/ipc.py"]
    with pytest.raises(ProvenanceError, match="is no virtual environment"):
        Surroundings.of(tmp_path)


def test_variables_that_change_results_are_those_of_the_record(store, chain, own, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("DAGSTER_HOME", "/elsewhere")
    record = chain[1].model_copy(
        update={"environment": {"variables": {"MKL_NUM_THREADS": "2", "VPMOE_ARTIFACTS": "/old"}}}
    )
    given = rerunning._environment(own, record, own.root)
    assert given["MKL_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in given
    assert given["VPMOE_ARTIFACTS"] == str(own.root)
    assert given["DAGSTER_HOME"] == str(own.home)
    assert given["VPMOE_GIT_SHA"] == "a" * 40


def test_a_run_that_fails_is_one_line_with_its_last_words(store, chain, own, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nprint('dagster.core.Failure: synth: no room left.')\nprint('x')\nexit(1)\n"
    )
    python.chmod(0o700)
    with pytest.raises(RerunError, match=r"^the run failed: .*no room left\. Its log is "):
        rerun(store, chain[1], own, python=python, present=None, log=lambda message: None)
