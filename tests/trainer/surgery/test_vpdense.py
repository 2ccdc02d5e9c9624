"""Donor to dense student: exact attention where heads agree, the largest FFN neurons, an honest report."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.trainer.surgery.surgery_cases import (
    VOCAB,
    convert_job,
    donor,
    loaded,
    payload,
    run,
    summary,
    vpdense_recipe,
    write_text,
)
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse
from trainer.model.context import forward_context
from trainer.model.document_mask import Documents
from trainer.surgery.vpdense import keep_largest
from trainer.surgery.weights import WeightsReader


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    write_text(root, [40] * 20)
    return root


@pytest.fixture(scope="module")
def plain_donor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("donor")
    return donor(directory), directory


def equal_heads(model: Qwen3ForCausalLM) -> None:
    """Makes the query heads of each pair and the key/value heads of each pair equal."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name, heads in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
                weight = getattr(layer.self_attn, name).weight
                pools = weight.unflatten(0, (heads // 2, 2, 8))
                pools[:, 1] = pools[:, 0]


def attention_outputs(theirs: Qwen3ForCausalLM, job, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Our attention and transformers' on the same normalised input, each ``[B, S, H]``."""
    architecture = parse(Architecture, job.recipe["architecture"])
    ours = loaded(architecture, payload(job))
    z = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(layer))
    positions = torch.arange(24).repeat(2, 1)
    context = forward_context(
        torch.zeros_like(positions), positions, Documents(torch.zeros_like(positions)), max_sequence_length=64
    )
    context.rotation = ours.rotary_pos_emb(positions)
    output, bias = ours.decoder.layers[layer].self_attention(z.transpose(0, 1), context)
    assert not bias.any()
    mask = torch.full((24, 24), float("-inf")).triu(1)[None, None]
    expected, _ = theirs.model.layers[layer].self_attn(
        z, position_embeddings=theirs.model.rotary_emb(z, positions), attention_mask=mask
    )
    return output.transpose(0, 1), expected


@torch.no_grad()
def test_a_donor_with_equal_heads_in_each_pool_has_no_attention_error(text, tmp_path):
    model = donor(tmp_path / "donor")
    equal_heads(model)
    model.save_pretrained(tmp_path / "donor")
    jobs = {
        how: convert_job(tmp_path, vpdense_recipe(o_proj_pool=how), how, parent=tmp_path / "donor", text=text)
        for how in ("sum", "mean")
    }
    assert [run(job) for job in jobs.values()] == [0, 0]
    for layer in range(3):
        ours, theirs = attention_outputs(model, jobs["sum"], layer)
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6 * float(theirs.abs().max()))
        halved, _ = attention_outputs(model, jobs["mean"], layer)
        torch.testing.assert_close(halved, theirs / 2, rtol=2e-5, atol=2e-6 * float(theirs.abs().max()))


@torch.no_grad()
def test_unequal_heads_are_averaged_pool_by_pool(plain_donor, text, tmp_path):
    model, directory = plain_donor
    job = convert_job(tmp_path, vpdense_recipe(), parent=directory, text=text)
    assert run(job) == 0
    ours, theirs = attention_outputs(model, job, 0)
    assert (ours - theirs).abs().max() > 1e-2 * theirs.abs().max(), "the exact case above proves something"
    attention = {name: value.numpy() for name, value in model.model.layers[1].self_attn.state_dict().items()}
    with WeightsReader(payload(job)) as reader:
        qkv = reader.read("decoder.layers.1.self_attention.linear_qkv.weight").numpy()
        proj = reader.read("decoder.layers.1.self_attention.linear_proj.weight").numpy()

    def mean(name: str, *heads: int) -> np.ndarray:
        return np.mean([attention[f"{name}_proj.weight"][head * 8 : head * 8 + 8] for head in heads], axis=0)

    expected = [
        mean("q", 0, 1),
        mean("q", 2, 3),
        mean("k", 0, 1),
        mean("v", 0, 1),
        mean("q", 4, 5),
        mean("q", 6, 7),
        mean("k", 2, 3),
        mean("v", 2, 3),
    ]
    np.testing.assert_allclose(qkv, np.concatenate(expected), rtol=1e-6)
    columns = attention["o_proj.weight"]
    summed = [columns[:, h * 16 : h * 16 + 8] + columns[:, h * 16 + 8 : h * 16 + 16] for h in range(4)]
    np.testing.assert_allclose(proj, np.concatenate(summed, axis=1), rtol=1e-6)


def test_the_ffn_keeps_the_neurons_with_the_largest_down_projection(plain_donor, text, tmp_path):
    model, directory = plain_donor
    job = convert_job(tmp_path, vpdense_recipe(ffn_scale=1.5), parent=directory, text=text)
    assert run(job) == 0
    report = summary(job)
    with WeightsReader(payload(job)) as reader:
        for layer in range(3):
            mlp = {name: value.numpy() for name, value in model.model.layers[layer].mlp.state_dict().items()}
            norms = np.sqrt((mlp["down_proj.weight"].astype(np.float64) ** 2).sum(0))
            kept = sorted(np.argsort(-norms, kind="stable")[:12].tolist())
            name = f"decoder.layers.{layer}.mlp.linear_fc{{}}.{{}}".format
            assert torch.equal(reader.read(name(1, "weight")), torch.from_numpy(mlp["up_proj.weight"][kept]))
            np.testing.assert_allclose(
                reader.read(name(2, "weight")), 1.5 * mlp["down_proj.weight"][:, kept], rtol=1e-6
            )
            assert not reader.read(name(1, "bias")).any()
            assert not reader.read(name(2, "bias")).any()
            text_of = ",".join(map(str, kept))
            assert report["transform"]["ffn_selection_indices"][str(layer + 1)] == kept
            hashed = hashlib.sha256(text_of.encode()).hexdigest()
            assert report["transform"]["ffn_selection_hashes"][str(layer + 1)] == hashed


def test_of_equal_norms_the_lower_index_wins():
    down = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]])
    assert keep_largest(down, 3).tolist() == [0, 1, 4]
    assert keep_largest(-down, 4).tolist() == [0, 1, 2, 4]


def test_embeddings_and_norms_are_copied_and_the_head_untied(plain_donor, text, tmp_path):
    model, directory = plain_donor
    job = convert_job(tmp_path, vpdense_recipe(), parent=directory, text=text)
    assert run(job) == 0
    theirs = model.state_dict()
    pairs = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "decoder.layers.1.input_layernorm.weight": "model.layers.1.input_layernorm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight": "model.layers.1.post_attention_layernorm.weight",
        "decoder.layers.1.self_attention.q_layernorm.weight": "model.layers.1.self_attn.q_norm.weight",
        "decoder.layers.1.self_attention.k_layernorm.weight": "model.layers.1.self_attn.k_norm.weight",
    }
    with WeightsReader(payload(job)) as reader:
        for ours, name in pairs.items():
            assert torch.equal(reader.read(ours), theirs[name]), name
        assert not any("softmax_offset" in name or "value_residual" in name for name in reader.names)


def test_an_untied_head_is_the_donors_own(text, tmp_path):
    model = donor(tmp_path / "donor")
    head = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(3))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(tmp_path / "donor")
    job = convert_job(tmp_path, vpdense_recipe(tied=False), parent=tmp_path / "donor", text=text)
    assert run(job) == 0
    with WeightsReader(payload(job)) as reader:
        assert torch.equal(reader.read("output_layer.weight"), head)


def test_the_report_measures_every_layer_and_a_refit_lowers_the_ffn_error(plain_donor, text, tmp_path):
    _, directory = plain_donor
    jobs = {
        method: convert_job(
            tmp_path,
            vpdense_recipe(ffn_method=method, calibration_tokens=512),
            method[-1],
            parent=directory,
            text=text,
        )
        for method in ("A", "A+lsq")
    }
    assert [run(job) for job in jobs.values()] == [0, 0]
    before, after = (summary(job) for job in jobs.values())
    for row, refitted in zip(before["layers"], after["layers"], strict=True):
        assert -1 <= row["cosine_to_donor"] <= 1
        assert 0 < row["kept_down_projection"] <= 1
        assert refitted["ffn_relative_mse"] < 1
        assert refitted["ffn_relative_mse"] < 0.5 * row["ffn_relative_mse"]
    for report in (before, after):
        assert report["checks"]["finite_logits"]["passed"]
        entropy = report["checks"]["better_than_guessing"]["metadata"]
        assert report["checks"]["better_than_guessing"]["passed"] == (
            entropy["cross_entropy"] < math.log(VOCAB)
        )
        assert len(entropy["sha256"]) == 64
    with WeightsReader(payload(jobs["A+lsq"])) as reader:
        assert reader.read("decoder.layers.0.mlp.linear_fc2.bias").any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_attention_heads", 4, "num_attention_heads: 8 expected, 4 found"),
        (
            "rope_parameters",
            {"rope_theta": 1e4, "rope_type": "default"},
            "rope_theta: 1000000.0 expected, 10000.0",
        ),
        ("rope_parameters", None, "rope_theta: 1000000.0 expected, None found"),
        ("hidden_act", "relu", "hidden_act: 'silu' expected, 'relu' found"),
        ("tie_word_embeddings", False, "tie_word_embeddings: True expected, False found"),
    ],
)
def test_another_donor_is_refused_before_any_work(key, value, message, plain_donor, text, tmp_path, capsys):
    _, directory = plain_donor
    other = tmp_path / "donor"
    other.mkdir()
    for path in directory.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {key: value}))
    job = convert_job(tmp_path, vpdense_recipe(), parent=other, text=text)
    assert run(job) == 1
    assert message in capsys.readouterr().err
    assert not payload(job).exists()
