"""A model card says what records say, in front matter that YAML reads."""

import pytest
import yaml

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage.errors import ComparisonError
from vpmoe_assets.lineage.model_card import model_card


def test_a_card_tells_origin_numbers_checks_and_scores_of_this_very_version(store):
    data = publish(store, "synth")
    check = {"name": "router_alive", "passed": True, "description": "a | b"}
    files = {"model.safetensors": b"w"}
    model = publish(store, "vpmoe", (data,), files=files, metrics={"loss": 3.0}, checks=[check])
    score = {"object_asset": "vpmoe", "object_version": model.version, "suite": "core8", "task": "mean"}
    scores = [
        {**score, "score": 0.25, "total": 8},
        {**score, "suite": "ppl", "task": "final/nll", "score": 9.5},
    ]
    publish(store, "eval_vpmoe", (model,), evals=scores)
    text = model_card(store, model)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["model_name"] == "smoke/vpmoe"
    metrics = {each["metrics"][0]["type"]: each["metrics"][0] for each in front["model-index"][0]["results"]}
    assert metrics["centered_accuracy"]["value"] == 0.25
    assert metrics["nll"]["name"] == "final/nll", "what is no accuracy is not said to be one"
    for line in (
        f"| content digest | `{model.digest}` |",
        "| loss | 3 |",
        "| core8 | mean | 0.25 | 8 |",
        r"| router_alive | passed | a \| b |",
        f"  - synth@{data.version} `{data.digest[:12]}`",
    ):
        assert line in text.splitlines()
    with pytest.raises(ComparisonError, match="a card is of a checkpoint"):
        model_card(store, data)
