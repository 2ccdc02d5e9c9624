"""Streaming files against the safetensors library, streamed checkpoints against the trainer's own."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.trainer.surgery.surgery_cases import compat, files, morphed, routed
from trainer.checkpoints.published import save_published
from trainer.contract.schema.experiment import load_experiment
from trainer.model.gpt import build_model
from trainer.surgery.tensorfile import DTYPES, TensorFile, TensorFileWriter, TensorSpec, WeightsError
from trainer.surgery.tensors import TORCH_DTYPES, tensor_table
from trainer.surgery.weights import WeightsReader, WeightsWriter

ARCHITECTURES = {
    "compat": compat(),
    "dense": morphed(),
    "dense without extras": morphed(
        softmax_type="off-by-one", value_residual=False, qk_layernorm=False, add_bias_linear=False
    ),
    "dense without biases": morphed(add_bias_linear=False, add_qkv_bias=False),
    "experts": routed(),
    "experts everywhere, unsteered": routed(first_layer_dense=False, router_enable_expert_bias=False),
}

names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.dictionaries(
    names, st.builds(TensorSpec, shapes, st.sampled_from(sorted(DTYPES.values(), key=str))), max_size=6
)


def filled(spec: TensorSpec, seed: int) -> torch.Tensor:
    values = torch.randint(0, 2, spec.shape, generator=torch.Generator().manual_seed(seed))
    return (values * 100).to(spec.dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=specs, backwards=st.booleans())
def test_a_file_has_the_bytes_and_the_content_of_the_library(specs, backwards, tmp_path):
    tensors = {name: filled(spec, number) for number, (name, spec) in enumerate(specs.items())}
    library, ours = tmp_path / "library.safetensors", tmp_path / "ours.safetensors"
    ours.unlink(missing_ok=True)
    save_file(tensors, library, metadata={"format": "pt"})
    with TensorFileWriter(ours, specs) as writer:
        for name in sorted(tensors, reverse=backwards):
            writer.write(name, tensors[name])
        writer.finish()
    assert ours.read_bytes() == library.read_bytes()
    file = TensorFile(library)
    assert file.specs == specs
    assert file.metadata == {"format": "pt"}
    for name, tensor in load_file(library).items():
        assert torch.equal(file.read(name), tensor)
        if tensor.ndim:
            for start, stop in ((0, 1), (1, None), (1, 3), (2, 2)):
                assert torch.equal(file.read(name, start, stop), tensor[start:stop])
    file.close()


def test_a_tensor_that_does_not_belong_is_refused(tmp_path):
    spec = TensorSpec((2, 3), torch.float32)
    with TensorFileWriter(tmp_path / "a", {"x": spec, "y": spec}) as writer:
        with pytest.raises(WeightsError, match=r"x: F32 \[2, 3\] expected, F32 \[3, 2\] found"):
            writer.write("x", torch.zeros(3, 2))
        with pytest.raises(WeightsError, match=r"F32 \[2, 3\] expected, BF16 \[2, 3\] found"):
            writer.write("x", torch.zeros(2, 3, dtype=torch.bfloat16))
        with pytest.raises(WeightsError, match="z: a has no place for it"):
            writer.write("z", torch.zeros(2, 3))
        writer.write("x", torch.zeros(2, 3))
        with pytest.raises(WeightsError, match="x: written twice"):
            writer.write("x", torch.zeros(2, 3))
        with pytest.raises(WeightsError, match=r"1 tensors were not written: \['y'\]"):
            writer.finish()
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "a", {})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shard_bytes", [2**31, 9_000])
def test_a_streamed_checkpoint_has_the_bytes_of_a_saved_one(name, dtype, shard_bytes, tmp_path):
    architecture = ARCHITECTURES[name]
    model = build_model(architecture, dtype=TORCH_DTYPES[dtype], seed=3)
    save_published(model, architecture, tmp_path / "saved", shard_bytes=shard_bytes)
    state = model.state_dict()
    with WeightsWriter(tmp_path / "streamed", architecture, dtype, shard_bytes=shard_bytes) as out:
        for tensor in reversed(out.specs):
            out.write(tensor, state[tensor].double())
        out.finish()
    saved, streamed = files(tmp_path / "saved"), files(tmp_path / "streamed")
    assert streamed == saved
    assert len(saved) == 3 or shard_bytes < 2**31
    with WeightsReader(tmp_path / "saved") as reader:
        reader.require_rung(architecture, dtype)
        assert {name: reader.digest(name) for name in reader.names} == out.digests


def test_a_rung_is_told_by_its_geometry_whatever_fusions_it_was_trained_with(tmp_path):
    flagged, plainest = routed(grouped_gemm=True), routed()
    with WeightsWriter(tmp_path / "flagged", flagged, "fp32") as out:
        for name, spec in out.specs.items():
            out.write(name, torch.ones(spec.shape, dtype=spec.dtype))
        out.finish()
    with WeightsReader(tmp_path / "flagged") as reader:
        reader.require_rung(plainest, "fp32")
        reader.require_rung(flagged, "fp32")
        with pytest.raises(WeightsError, match=r"architecture\.moe\.num_experts: 16 expected, 8 found"):
            reader.require_rung(routed(num_experts=16), "fp32")


@pytest.mark.parametrize("experiment", ["smoke", "full", "bench"])
def test_the_table_of_tensors_is_the_models(experiment):
    loaded = load_experiment(experiment)
    for rung in loaded.rungs.names():
        if rung == "qwen3_0_6b_o200k":
            continue
        architecture = loaded.architecture(rung)
        for name in ("fp32", "bf16"):
            built = build_model(architecture, dtype=TORCH_DTYPES[name], device="meta").state_dict()
            expected = {
                key: TensorSpec(tuple(value.shape), value.dtype)
                for key, value in built.items()
                if not key.endswith("_extra_state")
            }
            assert tensor_table(architecture, name) == expected


def test_a_checkpoint_is_complete_or_not_at_all(tmp_path):
    with WeightsWriter(tmp_path / "a", morphed(), "fp32") as out:
        out.write("decoder.final_layernorm.weight", torch.ones(32))
        with pytest.raises(WeightsError, match=r"tensors were not written"):
            out.finish()
        with pytest.raises(WeightsError, match=r"decoder\.fly: the architecture has no such tensor"):
            out.write("decoder.fly", torch.ones(32))
        with pytest.raises(WeightsError, match="NaN or infinity in the converted tensor"):
            out.write("decoder.layers.0.input_layernorm.weight", torch.full((32,), torch.inf))
    assert not (tmp_path / "a" / "config.json").exists()
    with pytest.raises(WeightsError, match="is not empty"):
        WeightsWriter(tmp_path / "a", morphed(), "fp32")


def test_a_value_too_large_for_the_stored_type_is_refused(tmp_path):
    with (
        WeightsWriter(tmp_path / "a", morphed(), "bf16") as out,
        pytest.raises(WeightsError, match=r"NaN or infinity in the converted tensor \(BF16 \[32\]\)"),
    ):
        out.write("decoder.final_layernorm.weight", torch.full((32,), 1e300, dtype=torch.float64))


def test_hugging_faces_layouts_are_read_with_and_without_an_index(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16()}
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(WeightsError, match=r"1 of 1 weight files missing: model.safetensors; found none"):
        WeightsReader(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with WeightsReader(tmp_path) as reader:
        assert reader.names == ("a", "b")
        assert torch.equal(reader.read_fp32("b"), tensors["b"].float())
        with pytest.raises(WeightsError, match="no tensor c among 2"):
            reader.read("c")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="weight files missing"):
        WeightsReader(tmp_path)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with WeightsReader(tmp_path) as reader:
        assert torch.equal(reader.read("a", 1, 3), tensors["a"][1:3])
