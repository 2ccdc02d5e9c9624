"""Published weights: same weights, same bytes; loaded strictly."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from tests.trainer.other_backend import SOURCE, add_backend
from trainer.checkpoints.format import INDEX_NAME, PublishedError
from trainer.checkpoints.published import load_published, read_architecture, read_config, save_published
from trainer.contract.fusions import FUSIONS
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.job.distributed import session
from trainer.model.gpt import VPGPTModel, build_model


def architecture(layers: int = 4, experts: int = 8) -> Architecture:
    tables = plain(load_experiment("smoke").architecture("vpmoe"))
    tables["vocab_size"] = 128
    tables["model"] |= {"num_layers": layers, "hidden_size": 32, "head_dim": 8}
    tables["moe"] |= {"num_experts": experts}
    return parse(Architecture, tables)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    before = torch.are_deterministic_algorithms_enabled()
    with session("cpu"):
        yield
    torch.use_deterministic_algorithms(before)


def model(seed: int = 1, dtype: torch.dtype = torch.float32, arch: Architecture | None = None) -> VPGPTModel:
    built = build_model(arch or architecture(), seed=seed, dtype=dtype)
    with torch.no_grad():
        for number, layer in enumerate(built.moe_layers):
            layer.router.expert_bias.copy_(torch.arange(8) * 0.5**number)
    return built


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_published_comes_back_to_the_bit(dtype, tmp_path):
    source, target = model(1, dtype), model(2, dtype)
    save_published(source, architecture(), tmp_path / "payload")
    load_published(target, tmp_path / "payload", architecture=architecture())
    ours, theirs = source.state_dict(), target.state_dict()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype
    assert any(name.endswith("router.expert_bias") for name in ours)
    assert read_config(tmp_path / "payload")["dtype"] == {torch.float32: "float32"}.get(dtype, "bfloat16")
    assert read_architecture(tmp_path / "payload") == architecture()


def test_names_are_those_of_the_model_and_tensors_are_counted(tmp_path):
    source = model()
    save_published(source, architecture(), tmp_path / "payload")
    index = json.loads((tmp_path / "payload" / INDEX_NAME).read_text())
    names = {name for name, _ in source.named_parameters()}
    names |= {name for name, _ in source.named_buffers() if name.endswith("expert_bias")}
    assert set(index["weight_map"]) == names
    assert "decoder.layers.1.mlp.experts.weight1" in names
    assert read_config(tmp_path / "payload")["parameters"] == sum(p.numel() for p in source.parameters())


def test_the_same_weights_give_the_same_bytes_in_shards(tmp_path):
    for name in ("a", "b"):
        save_published(model(3), architecture(), tmp_path / name, shard_bytes=20_000)
    first, second = bytes_of(tmp_path / "a"), bytes_of(tmp_path / "b")
    assert first == second
    shards = [name for name in first if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    target = model(4)
    load_published(target, tmp_path / "a")
    assert torch.equal(target.head_weight, model(3).head_weight)


def test_nothing_in_the_payload_tells_when_or_where_it_was_made(tmp_path):
    save_published(model(), architecture(), tmp_path / "payload")
    text = b"".join(
        content for name, content in bytes_of(tmp_path / "payload").items() if name.endswith(".json")
    )
    for word in (str(tmp_path), "unix", "host", "created"):
        assert word.encode() not in text


def test_published_weights_are_never_written_over(tmp_path):
    save_published(model(), architecture(), tmp_path / "payload")
    before = bytes_of(tmp_path / "payload")
    with pytest.raises(PublishedError, match="not empty"):
        save_published(model(9), architecture(), tmp_path / "payload")
    assert bytes_of(tmp_path / "payload") == before


def test_another_architecture_is_refused_naming_both_values(tmp_path):
    save_published(model(), architecture(), tmp_path / "payload")
    other = architecture(layers=8)
    with pytest.raises(PublishedError, match=r"model\.num_layers: 4 stored, 8 asked"):
        load_published(model(arch=other), tmp_path / "payload", architecture=other)


def with_flags(**flags: bool) -> Architecture:
    tables = plain(architecture())
    tables["moe"] |= flags
    return parse(Architecture, tables)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("flag", FUSIONS)
def test_weights_load_whatever_the_fusion_flags_say(flag, stored, tmp_path, monkeypatch):
    honours = SOURCE.replace('("grouped_gemm",)', repr(FUSIONS))
    backend = add_backend(monkeypatch, tmp_path, source=honours)
    made, asked = with_flags(**{flag: stored}), with_flags(**{flag: not stored})
    source = build_model(made, seed=1, backend=backend)
    save_published(source, made, tmp_path / "payload")
    assert read_config(tmp_path / "payload")["architecture"]["moe"][flag] is stored
    target = build_model(asked, seed=2, backend=backend)
    load_published(target, tmp_path / "payload", architecture=asked)
    assert all(torch.equal(p, q) for p, q in zip(source.parameters(), target.parameters(), strict=True))
    plainest = model(3)  # and into a backend that honours none of them
    load_published(plainest, tmp_path / "payload", architecture=architecture())
    assert torch.equal(plainest.head_weight, source.head_weight)


def test_what_is_no_architecture_is_refused_with_its_file(tmp_path):
    save_published(model(), architecture(), tmp_path / "payload")
    path = tmp_path / "payload" / "config.json"
    config = json.loads(path.read_text())
    del config["architecture"]["model"]["num_layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(PublishedError, match=r"config\.json: architecture: model\.num_layers: missing"):
        load_published(model(), tmp_path / "payload", architecture=architecture())


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A payload of one shard, and its tensors to change and write back."""
    payload = tmp_path / "payload"
    save_published(model(), architecture(), payload)
    shard = payload / "model-00001-of-00001.safetensors"
    return shard, load_file(shard)


HEAD = "output_layer.weight"


def rewrite(shard: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (shard.parent / INDEX_NAME).write_text(json.dumps(index))
    return shard.parent


def test_a_missing_and_an_unknown_tensor_are_named(damaged):
    shard, tensors = damaged
    tensors["head.weight"] = tensors.pop(HEAD)
    with pytest.raises(
        PublishedError, match=r"1 tensors missing \['output_layer.weight'\], 1 unknown .*'head.weight'"
    ):
        load_published(model(), rewrite(shard, tensors))


def test_a_wrong_shape_is_named_and_nothing_is_loaded(damaged):
    shard, tensors = damaged
    tensors[HEAD] = tensors[HEAD][:-1].contiguous()
    target = model(5)
    before = {name: value.clone() for name, value in target.named_parameters()}
    with pytest.raises(
        PublishedError, match=r"output_layer.weight: shape \[128, 32\] expected, \[127, 32\] found"
    ):
        load_published(target, rewrite(shard, tensors))
    assert all(torch.equal(value, before[name]) for name, value in target.named_parameters())


def test_a_wrong_dtype_is_refused_unless_a_cast_is_asked_for(damaged):
    shard, tensors = damaged
    tensors[HEAD] = tensors[HEAD].bfloat16()
    payload = rewrite(shard, tensors)
    with pytest.raises(PublishedError, match=r"output_layer.weight: dtype F32 expected, BF16 found"):
        load_published(model(), payload)
    target = model(6)
    load_published(target, payload, cast_dtype=True)
    assert torch.equal(target.head_weight, tensors[HEAD].float())


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(PublishedError, match="not a published checkpoint"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": "other"}')
    with pytest.raises(PublishedError, match="'other' found, 'vpmoe"):
        read_architecture(tmp_path)


def test_an_index_that_points_outside_or_nowhere_is_refused(damaged):
    shard, _ = damaged
    index = json.loads((shard.parent / INDEX_NAME).read_text())
    outside = shard.parent.parent / "x.safetensors"
    shutil.copy(shard, outside)
    for bad in ("../x.safetensors", "model-00009-of-00009.safetensors"):
        index["weight_map"][HEAD] = bad
        (shard.parent / INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(PublishedError, match="not a file in that directory"):
            load_published(model(), shard.parent)


def test_a_file_that_is_cut_off_and_an_index_that_is_none_are_refused_by_name(damaged):
    shard, _ = damaged
    content, index = shard.read_bytes(), (shard.parent / INDEX_NAME).read_text()
    for size in (0, 5, 60, len(content) - 1):
        shard.write_bytes(content[:size])
        with pytest.raises(
            PublishedError, match=rf"{shard.name} is cut off or damaged: {size} bytes.*restore it"
        ):
            load_published(model(), shard.parent)
    shard.write_bytes(content)
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', index[:-9]):
        (shard.parent / INDEX_NAME).write_text(text)
        with pytest.raises(PublishedError, match=rf"{INDEX_NAME} is no index of weights .*restore it"):
            load_published(model(), shard.parent)
