"""What makes two training runs the same."""

import copy
import hashlib

import pytest

from trainer.checkpoints.provenance import config_hash
from trainer.contract.canonical import canonical_json
from trainer.contract.fusions import FUSIONS
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment


def recipe(asset: str = "vpmoe_stage1") -> dict:
    return plain(load_experiment("smoke").train_recipe(asset))


@pytest.mark.parametrize("asset", ["vpmoe_stage1", "vpdense_28_healed"])
def test_the_hash_of_a_run_is_that_of_its_recipe_and_seed(asset):
    whole = canonical_json({"recipe": recipe(asset), "seed": 7})
    assert config_hash(recipe(asset), 7) == hashlib.sha256(whole.encode()).hexdigest()
    assert config_hash(recipe(asset), 8) != config_hash(recipe(asset), 7)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_run_may_go_on_with_other_fusions_and_not_with_another_geometry(fusion):
    other = copy.deepcopy(recipe())
    other["architecture"]["moe"][fusion] = True
    assert config_hash(other, 7) == config_hash(recipe(), 7)
    other["architecture"]["moe"]["topk"] = 4
    assert config_hash(other, 7) != config_hash(recipe(), 7)
