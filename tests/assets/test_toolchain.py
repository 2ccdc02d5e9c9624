"""Another release of torch or megatron-core: shown, and no reason to make anything again unless asked."""

import pytest
from click.testing import CliRunner

from vpmoe_assets.cli import main
from vpmoe_assets.codebase import toolchain

STRICT = {'name = "smoke"': 'name = "tiny"\nstrict_toolchain = true'}


@pytest.fixture
def newer_torch(monkeypatch) -> str:
    """The environment has a torch that nothing was made with."""
    real = toolchain.installed
    monkeypatch.setattr(
        toolchain, "installed", lambda name: "9.9.0" if name == "torch" else real(name), raising=True
    )
    return f"made with torch {real('torch')}, now 9.9.0"


def test_what_was_made_with_another_torch_is_reused_and_the_difference_shown(tiny, newer_torch):
    run = tiny.make("synth_harmony")
    assert run.reused() == {"synth_harmony": True}
    assert f"synth_harmony: {newer_torch}" in run.log()
    assert run.metadata("synth_harmony")["toolchain"] == newer_torch
    with tiny.environment():
        shown = CliRunner().invoke(main, ["show", "synth_harmony", "-e", "tiny"])
    assert newer_torch in shown.output


def test_a_strict_experiment_makes_it_again(tiny, graph, newer_torch):
    before = tiny.latest("synth_harmony")
    run = graph(STRICT, root=tiny.root).make("synth_harmony")
    assert run.reused() == {"synth_harmony": False}
    after = tiny.latest("synth_harmony")
    assert (after.fingerprint, after.digest) == (before.fingerprint, before.digest)


def test_a_strict_experiment_reuses_what_was_made_with_its_own_toolchain(tiny, graph):
    assert graph(STRICT, root=tiny.root).make("synth_harmony").reused() == {"synth_harmony": True}
