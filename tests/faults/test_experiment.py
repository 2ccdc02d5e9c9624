"""The experiment that faults are made in: whatever becomes of the ladder that it is a smaller one of."""

import pytest

from tests.faults.experiment import NAME, ORDER, SHORT, write
from trainer.contract.schema.experiment import load_experiment


@pytest.mark.parametrize(("short", "made"), [(False, ORDER), (True, SHORT)])
def test_it_holds_together_and_has_what_is_made_of_it(short, made, tmp_path):
    experiment = load_experiment(str(write(tmp_path / "faults.toml", short=short)))
    assert experiment.name == NAME
    assert "vpmoe_stage1" in made
    assert experiment.train_recipe("vpmoe_stage1").init == ("fresh" if short else "checkpoint")
