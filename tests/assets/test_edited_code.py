"""Code that is edited while a run works with it: a job is unaffected, and a step unaffected or refused.

The experiment of the review: a constant was changed after the run had started, and the record of other bytes
said that the code was clean. Here each run is a process of its own on a checkout of its own.
"""

import signal
from pathlib import Path

import pytest

from tests.assets.edited import Checkout, copy_of
from tests.assets.graphs import SHALLOW, Graph, write_experiment
from tests.assets.repeating import repeat
from vpmoe_assets.codebase.snapshot import unpack
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.packages import installed_packages
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = {
    **SHALLOW,
    "[stages.vpmoe_stage1]\nsteps = 10\n": "[stages.vpmoe_stage1]\nsteps = 2\n",
    "eval_interval = 5": "eval_interval = 10",
}


@pytest.fixture(scope="module")
def checkout_made(tmp_path_factory, forks) -> Checkout:
    return Checkout.make(tmp_path_factory.mktemp("checkout") / "project", forks)


@pytest.fixture
def checkout(checkout_made) -> Checkout:
    """The checkout as it was committed."""
    checkout_made.git("checkout", "-q", "--", ".")
    checkout_made.git("clean", "-q", "-f", "-d")
    return checkout_made


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    path = write_experiment(tmp_path_factory.mktemp("experiment") / "tiny.toml")
    text = path.read_text()
    for old, new in SHORT.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def packed(tiny_made, tmp_path_factory, experiment) -> Store:
    """A store with what the stage of that experiment is trained on."""
    root = tmp_path_factory.mktemp("packed") / "artifacts"
    data = copy_of(tiny_made[0].store, root, "synth", "o200k_tokenizer", "synth_harmony")
    Graph(experiment, data.root).make("synth_kd_v1")
    return data


INIT = "trainer/model/init.py"
EDIT_BEFORE_THE_JOB = f"""
from vpmoe_assets.resources.launchers.local import LocalHandle
before(LocalHandle, "start", lambda: edit({INIT!r}, "INIT_STD = 0.02", "INIT_STD = 0.5"))
"""


def test_a_job_runs_the_code_that_was_hashed_and_can_be_repeated_from_its_record(
    packed, tmp_path, checkout, experiment, forks
):
    def trained(name: str, meanwhile: str = ""):
        store = copy_of(packed, tmp_path / name, "synth_kd_v1")
        said = checkout.run(experiment, store, "vpmoe_stage1", meanwhile=meanwhile)
        assert said["error"] == "", said["log"]
        return store, store.find("tiny", "vpmoe_stage1")

    edited_store, edited = trained("edited", EDIT_BEFORE_THE_JOB)
    assert "INIT_STD = 0.5" in (checkout.root / INIT).read_text()
    assert (edited.code.git_dirty, edited.objects.patch) == (False, None)
    kept = unpack(ObjectStore(edited_store.root).get(edited.objects.sources))
    assert b"INIT_STD = 0.02" in kept[INIT]

    # From here on the tree is dirty: the edit is part of the identity, and it matters.
    store, dirty = trained("dirty")
    assert dirty.code.git_dirty
    assert dirty.fingerprint != edited.fingerprint
    assert dirty.digest != edited.digest, "the code that the first one ran was not this"
    objects = ObjectStore(store.root)
    assert b"+INIT_STD = 0.5\n" in objects.get(dirty.objects.patch)
    assert objects.get_json(dirty.objects.packages) == list(installed_packages())
    assert objects.get(dirty.objects.experiment) == experiment.read_bytes()

    checkout.git("checkout", "-q", "--", ".")
    (tmp_path / "empty").mkdir()
    again = repeat(dirty, objects, packed, tmp_path / "empty", forks)
    assert (again.digest, again.fingerprint) == (dirty.digest, dirty.fingerprint)


CONVERSATION = "vpmoe_assets/harmony/conversation.py"
THERE = f"edit({CONVERSATION!r}, '\"text\": reasoning}}', '\"text\": reasoning.upper()}}')"
BACK = f"edit({CONVERSATION!r}, '\"text\": reasoning.upper()}}', '\"text\": reasoning}}')"
"""An edit that changes every byte of `synth_harmony`, and the way back."""
SHARDS = "from vpmoe_assets.harmony import synth_harmony as library\n"


@pytest.fixture
def data(tiny_made, tmp_path) -> Store:
    """A store with what `synth_harmony` is made from."""
    return copy_of(tiny_made[0].store, tmp_path / "artifacts", "synth", "o200k_tokenizer")


@pytest.mark.parametrize(
    ("meanwhile", "workers"),
    [
        (THERE, 1),  # before the process imports what builds the shards
        (f"{SHARDS}after(library, 'run_shards', lambda: {THERE})", 1),  # when everything is imported
        (
            f"{SHARDS}before(library, 'run_shards', lambda: {THERE})\n"
            f"after(library, 'run_shards', lambda: {BACK})",
            2,
        ),
    ],
    ids=["before-the-import", "after-the-work", "there-and-back"],
)
def test_a_step_whose_code_was_edited_meanwhile_is_refused_and_nothing_of_it_is_used(
    tiny_made, data, checkout, meanwhile, workers
):
    experiment = tiny_made[0].experiment
    refused = checkout.run(experiment, data, "synth_harmony", meanwhile=meanwhile, workers=workers)
    assert f"synth_harmony: {CONVERSATION}: saved while this process worked with it" in refused["error"]
    assert data.versions("tiny", "synth_harmony") == []
    assert not list((data.root / ".work" / "tiny").glob("synth_harmony-*"))

    checkout.git("checkout", "-q", "--", ".")
    made = checkout.run(experiment, data, "synth_harmony", workers=workers)
    assert made["reused"] == {"synth_harmony": False}
    assert_as_it_should_be(data, tiny_made[0].store)


def assert_as_it_should_be(store: Store, expected: Store) -> None:
    record = store.find("tiny", "synth_harmony")
    assert record.digest == expected.find("tiny", "synth_harmony").digest
    assert (record.sequence, record.code.git_dirty) == (1, False)
    assert verify_record(store, record) == []


@pytest.mark.parametrize("edited", [THERE, "None"], ids=["edited", "not-edited"])
def test_a_killed_step_goes_on_from_its_work_unless_its_code_was_edited_since_it_began(
    tiny_made, data, checkout, edited
):
    experiment = tiny_made[0].experiment
    killed = checkout.run(
        experiment,
        data,
        "synth_harmony",
        meanwhile=f"{SHARDS}before(library, 'run_shards', lambda: {edited})\n"
        "after(library, 'run_shards', lambda: os.kill(os.getpid(), signal.SIGKILL))",
        workers=2,
    )
    assert killed["code"] == -signal.SIGKILL
    (left,) = (data.root / ".work" / "tiny").glob("synth_harmony-*")
    assert len(list(left.rglob("*.parquet"))) == 2

    if edited == THERE:
        checkout.git("checkout", "-q", "--", ".")
    made = checkout.run(experiment, data, "synth_harmony", workers=2)
    assert made["reused"] == {"synth_harmony": False}
    assert ("begun anew, because source files were saved" in made["log"]) == (edited == THERE)
    assert_as_it_should_be(data, tiny_made[0].store)


def test_an_edit_of_code_that_the_step_does_not_run_is_none_of_its_business(tiny_made, data, checkout):
    meanwhile = f"edit({INIT!r}, 'INIT_STD = 0.02', 'INIT_STD = 0.5')"
    made = checkout.run(tiny_made[0].experiment, data, "synth_harmony", meanwhile=meanwhile)
    assert made["error"] == ""
    assert_as_it_should_be(data, tiny_made[0].store)
