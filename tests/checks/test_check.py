"""The one way to write a check: a function under a decorator."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from trainer.contract.canonical import UnstableValueError
from vpmoe_assets.checks import data, rungs, training
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.verdict import Verdict


def test_the_docstring_says_what_the_check_holds_the_payload_to():
    @check("files_there")
    def files_there(build, inputs):
        """Every file is there.

        The rest of the text is for who reads the code.
        """
        return Verdict(build.files == inputs["source"], "two of two", {"files": build.files})

    assert isinstance(files_there, Check)
    assert (files_there.name, files_there.blocking) == ("files_there", True)
    assert files_there.description.splitlines()[0] == "Every file is there."
    verdict = files_there.run(SimpleNamespace(files=2), {"source": 2})
    assert verdict == (True, "two of two", {"files": 2})
    assert not files_there.run(SimpleNamespace(files=1), {"source": 2}).passed


def test_a_given_text_stands_in_place_of_the_docstring():
    @check("budget", blocking=False, description="At most 5 tokens.")
    def budget(build, inputs):
        """Compare with the budget."""
        return Verdict(True, "", {})

    assert (budget.description, budget.blocking) == ("At most 5 tokens.", False)


def test_a_version_is_of_the_code_and_of_what_the_check_was_given():
    assert data.healing_budget(5).version == data.healing_budget(5).version
    assert data.healing_budget(5).version != data.healing_budget(6).version
    assert rungs.measured("a", "x", blocking=True).version != rungs.measured("b", "x", blocking=True).version
    assert rungs.measured("a", "x", blocking=True).version == rungs.measured("a", "y", blocking=False).version
    assert training.resume_drift.version != training.heldout_loss_fell.version, "one module, two checks"


def test_renaming_a_check_or_letting_it_block_changes_no_version():
    renamed = replace(training.resume_drift, name="drift", blocking=False, description="Another text.")
    assert renamed.version == training.resume_drift.version


def test_a_check_is_given_nothing_that_has_no_stable_form():
    def of(things):
        @check("given")
        def given(item, inputs):
            return Verdict(bool(things), "", {})

        return given

    assert of([1, 2]).version == of([1, 2]).version
    with pytest.raises(UnstableValueError, match=r"a check was given things, .*set"):
        _ = of({1, 2}).version
