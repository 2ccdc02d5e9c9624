"""The seeded checkpoints: transformers loads them, their bytes are fixed, and others are refused."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Qwen3ForCausalLM

from tests.donors.conftest import DONOR, SEED, VOCABULARY
from trainer.contract.donor import HF_EMBEDDING, HF_HEAD, donor_shapes
from trainer.contract.schema.sources import SeededDonor
from vpmoe_assets.donors import checkpoints
from vpmoe_assets.donors.checkpoints import (
    checkpoint_shapes,
    qwen3_config,
    require_qwen3,
    require_vocabulary,
    write_json,
)
from vpmoe_assets.donors.tensors import save_bfloat16, seeded_normal
from vpmoe_assets.errors import DonorError

SMALL = DONOR.model_copy(update={"vocab_size": 300})


GOLDEN_WEIGHTS = "b7f994c784fbe24326c31081cad0058c99af955ada77c6c837951ca94dd502e2"
"""sha256 of the seeded weights of SMALL: the same with every NumPy and on every machine."""


def small_donor(directory: Path, donor: SeededDonor = SMALL) -> Path:
    directory.mkdir()
    tensors = {name: seeded_normal(1, name, shape, 0.02) for name, shape in donor_shapes(donor).items()}
    save_bfloat16(tensors, directory / "model.safetensors")
    write_json(directory / "config.json", qwen3_config(donor))
    return directory


def test_transformers_loads_the_donor_whole(qwen3: Path):
    model, report = AutoModelForCausalLM.from_pretrained(qwen3, output_loading_info=True)
    assert isinstance(model, Qwen3ForCausalLM)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        logits = model(torch.tensor([[9707, 11, 1879, 0]])).logits
    assert logits.shape == (1, 4, DONOR.vocab_size)
    assert torch.isfinite(logits).all()


def test_transformers_loads_the_vocabulary_donor_whole(gpt_oss: Path):
    model, report = AutoModelForCausalLM.from_pretrained(gpt_oss, output_loading_info=True)
    assert isinstance(model, GptOssForCausalLM)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_input_embeddings().weight.shape == (VOCABULARY.vocab_size, VOCABULARY.hidden_size)


def test_the_layers_of_the_donor_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A converter that loses a layer must not pass unnoticed: each layer changes the residual stream."""
    monkeypatch.setattr(checkpoints.tokenizers, "qwen3_tokenizer_json", lambda: b"{}")
    checkpoints.write_seeded_qwen3(SMALL.model_copy(update={"num_layers": 4}), SEED, tmp_path / "donor")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    with torch.no_grad():
        states = model(torch.arange(32)[None], output_hidden_states=True).hidden_states
    for before, after in pairwise(states[:-1]):  # the last one is normalised
        assert (after - before).norm() > 0.1 * before.norm()


def test_weights_are_these_bytes_everywhere(tmp_path: Path):
    donor = small_donor(tmp_path / "a")
    again = small_donor(tmp_path / "b")
    weights = (donor / "model.safetensors").read_bytes()
    assert weights == (again / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == GOLDEN_WEIGHTS


def test_the_config_of_the_donor_is_accepted_with_its_tensors(qwen3: Path, gpt_oss: Path):
    require_qwen3(DONOR, qwen3)
    require_vocabulary(VOCABULARY, gpt_oss)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 3),
        ("rope_theta", 1e4),
        ("tie_word_embeddings", False),
        ("hidden_act", "gelu"),
        ("model_type", "llama"),
        ("rms_norm_eps", 1e-5),
    ],
)
def test_a_donor_of_another_geometry_is_refused(tmp_path: Path, key: str, value: object):
    directory = small_donor(tmp_path / "donor")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(DonorError, match=rf"{key}: {value!r} found"):
        require_qwen3(SMALL, directory)


def test_rope_theta_is_found_where_newer_configs_keep_it(tmp_path: Path):
    directory = small_donor(tmp_path / "donor")
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (directory / "config.json").write_text(json.dumps(config))
    require_qwen3(SMALL, directory)


def test_a_stored_copy_of_the_tied_head_is_accepted(tmp_path: Path):
    directory = small_donor(tmp_path / "donor")
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, HF_HEAD: tensors[HF_EMBEDDING].clone()}, directory / "model.safetensors")
    require_qwen3(SMALL, directory)


def test_a_missing_tensor_an_unknown_one_and_a_wrong_shape_are_named(tmp_path: Path):
    directory = small_donor(tmp_path / "donor")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors |= {"model.extra": torch.zeros(2), "model.norm.weight": torch.zeros(9)}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(
        DonorError,
        match=r"lacks 1 tensors \(model.layers.1.mlp.up_proj.weight\); has 1 unknown tensors \(model.extra\);"
        r" 1 shapes differ \(model.norm.weight is \[9\], expected \[8\]\)",
    ):
        require_qwen3(SMALL, directory)


def test_a_missing_shard_is_named(tmp_path: Path):
    directory = small_donor(tmp_path / "donor")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    names = list(checkpoint_names(directory / "model-00001-of-00002.safetensors"))
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map[names[0]] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DonorError, match="disagree on 1 tensors"):
        checkpoint_shapes(directory)
    weight_map[names[0]] = "model-00001-of-00002.safetensors"
    weight_map["model.elsewhere"] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DonorError, match=r"model-00002-of-00002.safetensors: no such file"):
        checkpoint_shapes(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_or_a_configuration_that_is_none_is_named(tmp_path: Path, text: str):
    directory = small_donor(tmp_path / "donor")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DonorError, match=r"index\.json is no index of weights"):
        checkpoint_shapes(directory)
    (directory / "config.json").write_text(text[:1] + "1, 2")
    with pytest.raises(DonorError, match=r"config\.json: not a readable configuration"):
        require_qwen3(SMALL, directory)


def checkpoint_names(path: Path) -> list[str]:
    return sorted(load_file(path))


def test_a_cut_off_file_is_named(tmp_path: Path):
    directory = small_donor(tmp_path / "donor")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(DonorError, match="cut off or damaged"):
        require_qwen3(SMALL, directory)


def test_vocabulary_of_another_width_is_refused(gpt_oss: Path, tmp_path: Path):
    wider = VOCABULARY.model_copy(update={"hidden_size": 16})
    with pytest.raises(DonorError, match="hidden_size: 8 found, 16 expected"):
        require_vocabulary(wider, gpt_oss)
    shutil.copytree(gpt_oss, tmp_path / "copy")
    config = json.loads((gpt_oss / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    with pytest.raises(DonorError, match="shapes differ"):
        require_vocabulary(wider, tmp_path / "copy")


def test_the_donor_expects_early_tokens_more_than_late_ones(qwen3: Path):
    """Ids are by frequency, so a model that does so predicts text better than chance."""
    model = AutoModelForCausalLM.from_pretrained(qwen3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model(torch.randint(0, 2000, (4, 64), generator=generator)).logits.float()
    expected = logits.log_softmax(-1)[..., :2000].mean()
    assert expected > -torch.tensor(float(DONOR.vocab_size)).log() + 0.02
