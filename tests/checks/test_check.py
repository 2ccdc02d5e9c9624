"""The one way to write a check: a function under a decorator."""

from types import SimpleNamespace

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
