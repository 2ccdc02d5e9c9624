"""The checks of rungs on their own: the layout of QKV in real files, and verdicts over summaries."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.assets.rungs import conversion_checks
from vpmoe_assets.checks.rungs import distance, loss_not_diverged
from vpmoe_assets.rungs.morph import tpa_fit
from vpmoe_assets.rungs.vpdense import interleave_identity

SMOKE = load_experiment("smoke")
RECIPE = SMOKE.convert_recipe("vpdense0_5_28")


def build_with(tmp_path: Path, **summary: object) -> SimpleNamespace:
    return SimpleNamespace(summary=json.loads(json.dumps(summary)), payload=tmp_path / "payload")


def donor_and_result(tmp_path: Path, layout: str, dtype: torch.dtype) -> tuple[SimpleNamespace, dict]:
    """A donor's projections, and what a converter with this layout makes of them."""
    generator = torch.Generator().manual_seed(0)
    model, donor = RECIPE.architecture.model, RECIPE.donor
    theirs, ours = {}, {}
    for layer in range(model.num_layers):
        heads = {
            "q": donor.num_attention_heads,
            "k": donor.num_key_value_heads,
            "v": donor.num_key_value_heads,
        }
        pooled = {}
        for part, count in heads.items():
            weight = torch.randn(count * donor.head_dim, donor.hidden_size, generator=generator)
            weight = weight.bfloat16().float()
            theirs[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = weight
            kept = model.num_attention_heads if part == "q" else model.num_query_groups
            split = weight.reshape(kept, count // kept, model.head_dim, -1)
            pooled[part] = [sum(members) / len(members) for members in split]
        each = model.num_attention_heads // model.num_query_groups
        if layout == "interleaved":
            rows = []
            for group in range(model.num_query_groups):
                queries = pooled["q"][group * each : (group + 1) * each]
                rows += [*queries, pooled["k"][group], pooled["v"][group]]
        else:
            rows = pooled["q"] + pooled["k"] + pooled["v"]
        ours[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] = torch.cat(rows).to(dtype)
    (tmp_path / "donor").mkdir()
    (tmp_path / "payload").mkdir()
    save_file(theirs, tmp_path / "donor" / "model.safetensors")
    save_file(ours, tmp_path / "payload" / "model.safetensors")
    inputs = {"qwen3_0_6b_o200k": SimpleNamespace(payload=tmp_path / "donor")}
    return SimpleNamespace(payload=tmp_path / "payload"), inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_heads_are_found_in_their_groups(tmp_path, dtype):
    build, inputs = donor_and_result(tmp_path, "interleaved", dtype)
    passed, description, details = interleave_identity(RECIPE).run(build, inputs)
    assert passed, description
    assert details["worst"] <= (1e-6 if dtype == torch.float32 else 2**-8)


def test_blocks_of_heads_are_refused_though_the_shape_is_the_same(tmp_path):
    build, inputs = donor_and_result(tmp_path, "blocks", torch.float32)
    passed, _, details = interleave_identity(RECIPE).run(build, inputs)
    assert not passed
    assert details["worst"] > 0.5


def test_a_stream_that_turns_away_from_its_source_is_noticed(tmp_path):
    check = distance("distance_to_donor", "cosine", "…")
    near = build_with(tmp_path, layers=[{"cosine": 0.9}, {"cosine": 0.5}])
    assert check.run(near, {})[0]
    far = build_with(tmp_path, layers=[{"cosine": 0.9}, {"cosine": -0.1}])
    passed, description, details = check.run(far, {})
    assert (passed, details["min"]) == (False, -0.1)
    assert "mean 0.400" in description
    assert not check.blocking


def test_a_fit_that_is_worse_than_nothing_is_noticed(tmp_path):
    layers = [
        {"layer": 1, "q_relative_mse": 0.2, "k_relative_mse": 0.3, "v_relative_mse": 0.1},
        {"layer": 4, "q_relative_mse": None, "k_relative_mse": None, "v_relative_mse": None},
    ]
    assert tpa_fit.run(build_with(tmp_path, layers=layers), {})[0]
    layers[0]["k_relative_mse"] = 1.5
    passed, description, details = tpa_fit.run(build_with(tmp_path, layers=layers), {})
    assert (passed, details["worst"]) == (False, 1.5)
    assert "worst layer 1.500" in description


@pytest.mark.parametrize(("end", "passed"), [(8.0, True), (10.4, True), (10.6, False)])
def test_a_loss_that_runs_away_is_noticed(tmp_path, end, passed):
    build = build_with(tmp_path, heldout_loss_start=10.0, heldout_loss_end=end, uniform_loss=12.2)
    assert loss_not_diverged.run(build, {})[0] is passed


def test_what_would_make_the_rungs_below_wrong_is_blocking():
    blocking = {
        rung: {check.name for check in conversion_checks(SMOKE.convert_recipe(rung)) if check.blocking}
        for rung in ("qwen3_0_6b_o200k", "vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe")
    }
    assert blocking == {
        "qwen3_0_6b_o200k": {
            "weights_complete",
            "rest_copied",
            "vocabulary_rows",
            "shared_tokens_copied",
        },
        "vpdense0_5_28": {"weights_complete", "rest_copied", "interleave_identity", "finite_logits"},
        "vpdense_28": {"weights_complete", "rest_copied", "finite_logits"},
        "vpdense_80": {"weights_complete", "layers_copied", "logits_bit_identical"},
        "vpmoe": {"weights_complete", "parent_kept", "logits_bit_identical"},
    }


def test_at_a_gain_the_logits_need_only_be_finite():
    recipe = SMOKE.convert_recipe("vpmoe")
    opened = recipe.model_copy(update={"surgery": recipe.surgery.model_copy(update={"routed_gain": 0.5})})
    names = {check.name for check in conversion_checks(opened)}
    assert "logits_finite" in names
    assert "logits_bit_identical" not in names
