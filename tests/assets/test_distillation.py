"""The teacher, the store of its scores and what is published of both; only the trainer is a stand-in."""

import pytest

from tests.assets.graphs import Graph, stand_in_trainer

PROGRAM = "stand_in_training"


@pytest.fixture
def taught(tiny, monkeypatch) -> Graph:
    """The experiment with its first stage trained, and a trainer that makes the rest up."""
    tiny.resources = {"trainer": stand_in_trainer(monkeypatch, PROGRAM)}
    tiny.make("vpmoe_stage1")
    return tiny


def test_a_teacher_of_our_own_is_trained_on_and_says_what_it_is(taught):
    run = taught.make("teacher")
    record = taught.latest("teacher")
    assert {given.asset for given in record.inputs} == {"vpmoe_stage1", "synth_kd_v1"}
    assert (record.recipe["init"], record.recipe["steps"]) == ("checkpoint", record.metrics["steps"])
    assert run.metadata("teacher")["teacher"].startswith("a stand-in: our own vpmoe_stage1, trained ")
    checks = {name: (found.passed, found.blocking) for name, found in run.checks("teacher").items()}
    assert checks["token_id_space"] == (True, True)
    assert all(passed for passed, _ in checks.values())
