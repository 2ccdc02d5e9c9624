"""The checks that read published weights: passed by what the trainer really writes, failed by each fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.forks import Forks
from tests.trainer.surgery.surgery_cases import (
    compat,
    convert_job,
    donor,
    expand_recipe,
    morphed,
    payload,
    publish,
    publish_as,
    run,
    upcycle_recipe,
    vpdense_recipe,
    write_text,
)
from tests.trainer.surgery.vocabulary_cases import (
    vocabulary_job,
    vocabulary_recipe,
    write_donor,
    write_vocabulary,
)
from trainer.contract.safetensors_header import read_header
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.job import Job
from vpmoe_assets.assets.rungs import conversion_checks
from vpmoe_assets.checks.check import Check
from vpmoe_assets.donors.audit import rung_config_faults, rung_tensors, tensor_faults
from vpmoe_assets.donors.checkpoints import weight_files
from vpmoe_assets.verdict import Verdict

pytestmark = pytest.mark.slow

LENGTHS = [70, 33, 120, 9, 250, 41, 90, 64]


class Converted:
    """A conversion that was really made, and copies of it to damage."""

    def __init__(self, job: Job, **inputs: Path) -> None:
        assert run(job) == 0
        self.recipe, self.payload = job.convert_recipe(), payload(job)
        self.inputs = {name: SimpleNamespace(payload=path) for name, path in inputs.items()}
        self.checks: dict[str, Check] = {check.name: check for check in conversion_checks(self.recipe)}

    def judge(self, name: str, directory: Path | None = None) -> Verdict:
        item = SimpleNamespace(payload=directory or self.payload)
        return self.checks[name].run(item, self.inputs)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def expanded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("expanded")
    parent = publish_as(morphed(num_layers=8), root / "parent" / "payload", "fp32")
    recipe = expand_recipe(dtype=request.param)
    return Converted(convert_job(root, recipe, parent=parent), parent=parent)


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("upcycled")
    parent = publish_as(morphed(), root / "parent" / "payload", "fp32")
    return Converted(convert_job(root, upcycle_recipe(), parent=parent), parent=parent)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("dense")
    source = root / "donor" / "payload"
    donor(source)
    write_text(root / "text", LENGTHS)
    job = convert_job(root, vpdense_recipe(), parent=source, text=root / "text")
    return Converted(job, parent=source)


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("remade")
    parent = root / "parent" / "payload"
    publish(compat(), parent)
    write_text(root / "text", LENGTHS)
    recipe = {
        "step": "morph",
        "source": "parent",
        "text": "text",
        "parent": plain(compat()),
        "parent_dtype": "fp32",
        "architecture": plain(morphed()),
        "dtype": "bf16",
        "surgery": {
            "tpa_init": "als",
            "als_sweeps": 3,
            "softmax_offset_init": -4.0,
            "calibration_tokens": 256,
        },
    }
    return Converted(convert_job(root, recipe, parent=parent, text=root / "text"), parent=parent)


@pytest.fixture(scope="module", params=[False, True])
def respelled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forks: Forks
) -> Converted:
    root = tmp_path_factory.mktemp("respelled")
    donor, vocabulary = root / "donor" / "payload", root / "vocabulary"
    write_donor(donor, tied=request.param)
    write_vocabulary(vocabulary)
    job = vocabulary_job(root, donor, vocabulary, vocabulary_recipe(tied=request.param))
    with forks.below():
        return Converted(job, qwen3_0_6b=donor, gpt_oss_20b=vocabulary)


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the first weight file; its tensors' bytes stay."""
    path = min(directory.glob("*.safetensors"))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        stated = json.loads(index.read_text())
        names = [name for name in header if name != "__metadata__"]
        others = {name: file for name, file in stated["weight_map"].items() if file != path.name}
        stated["weight_map"] = others | dict.fromkeys(names, path.name)
        index.write_text(json.dumps(stated))


def flip(directory: Path, name: str) -> None:
    """Flip one bit of a tensor."""
    path = weight_files(directory)[name]
    entry = read_header(path).entries[name]
    with path.open("r+b") as file:
        file.seek(entry.start)
        byte = file.read(1)[0]
        file.seek(entry.start)
        file.write(bytes([byte ^ 1]))


def swap(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[one], header[other] = header[other], header[one]

    return change


def test_what_the_trainer_writes_passes(
    dense: Converted, remade: Converted, expanded: Converted, upcycled: Converted
) -> None:
    names = {
        "weights_complete": (dense, remade, expanded, upcycled),
        "layers_copied": (expanded,),
        "parent_kept": (upcycled,),
        "rest_copied": (dense, remade),
    }
    for name, results in names.items():
        for result in results:
            verdict = result.judge(name)
            assert verdict.passed, f"{name}: {verdict.description}"
    assert expanded.judge("layers_copied").metadata["zero"] == 8 * 4
    assert upcycled.judge("parent_kept").metadata["zero"] == 3


def test_what_the_trainer_writes_with_another_vocabulary_passes(respelled: Converted) -> None:
    for name in ("weights_complete", "rest_copied"):
        verdict = respelled.judge(name)
        assert verdict.passed, f"{name}: {verdict.description}"


LAYER = "decoder.layers.{}.self_attention.linear_proj.weight"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda d: rewrite(d, lambda h: h.pop(LAYER.format(3))), "tensors missing: decoder.layers.3.self"),
        (lambda d: rewrite(d, lambda h: h.update({"decoder.extra": h[LAYER.format(0)]})), "not of this arch"),
        (
            lambda d: rewrite(d, lambda h: h[LAYER.format(0)].update(shape=[16, 64])),
            "is F32[16, 64], expected F32[32, 32]",
        ),
        (
            lambda d: rewrite(d, lambda h: h[LAYER.format(0)].update(dtype="I32")),
            "is I32[32, 32], expected F32[32, 32]",
        ),
        (
            lambda d: rewrite(d, lambda h: h[LAYER.format(0)].update(dtype="BF16", shape=[64, 32])),
            "is BF16[64, 32], expected F32[32, 32]",
        ),
        (
            lambda d: rewrite(
                d, lambda h: h[LAYER.format(1)].update(data_offsets=h[LAYER.format(0)]["data_offsets"])
            ),
            "starts at byte",
        ),
        (lambda d: min(d.glob("*.safetensors")).open("ab").write(b"more"), "the end of the file starts at"),
        (lambda d: _cut(min(d.glob("*.safetensors"))), "is cut off or damaged"),
        (lambda d: min(d.glob("*.safetensors")).unlink(), "no such file"),
        (lambda d: shutil.copy(min(d.glob("*.safetensors")), d / "z.safetensors"), "z.safetensors is in the"),
        (lambda d: (d / "config.json").unlink(), "not a readable configuration"),
        (lambda d: _config(d, "dtype", "float16"), "dtype is 'float16', the recipe says 'float32'"),
        (lambda d: _config(d, "parameters", 7), "parameters is 7, the recipe says"),
        (lambda d: _config(d, "tensors", 7), "tensors is 7, the recipe says"),
        (
            lambda d: _config(d, "architecture", {**_stated(d)["architecture"], "vocab_size": 7}),
            "architecture.vocab_size is 7",
        ),
    ],
)
def test_files_that_do_not_hold_the_architecture_fail(
    fault: Callable[[Path], Any], words: str, upcycled: Converted, tmp_path: Path
) -> None:
    damaged = shutil.copytree(upcycled.payload, tmp_path / "payload")
    fault(damaged)
    verdict = upcycled.judge("weights_complete", damaged)
    assert not verdict.passed
    assert words in verdict.description


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _stated(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def _config(directory: Path, key: str, value: Any) -> None:
    (directory / "config.json").write_text(json.dumps(_stated(directory) | {key: value}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            lambda d: flip(d, "embedding.word_embeddings.weight"),
            "embedding.word_embeddings.weight is not embedding.word_embeddings.weight of parent",
        ),
        (
            lambda d: flip(d, "decoder.layers.8.mlp.linear_fc1.weight"),
            "decoder.layers.8.mlp.linear_fc1.weight is not decoder.layers.4.mlp.linear_fc1.weight of parent",
        ),
        (
            lambda d: rewrite(
                d, swap("decoder.layers.0.input_layernorm.weight", "decoder.layers.1.input_layernorm.weight")
            ),
            "decoder.layers.0.input_layernorm.weight is not decoder.layers.0.input_layernorm.weight",
        ),
        (
            lambda d: flip(d, "decoder.layers.4.mlp.linear_fc2.weight"),
            "decoder.layers.4.mlp.linear_fc2.weight is not zero",
        ),
    ],
)
def test_a_layer_that_is_not_its_parents_fails(
    fault: Callable[[Path], Any], words: str, expanded: Converted, tmp_path: Path
) -> None:
    damaged = shutil.copytree(expanded.payload, tmp_path / "payload")
    fault(damaged)
    assert expanded.judge("weights_complete", damaged).passed, "names, shapes and types are still right"
    verdict = expanded.judge("layers_copied", damaged)
    assert not verdict.passed
    assert words in verdict.description


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("output_layer.weight", "model.embed_tokens.weight"),
        ("decoder.layers.1.pre_mlp_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("decoder.layers.2.self_attention.k_layernorm.weight", "model.layers.2.self_attn.k_norm.weight"),
    ],
)
def test_what_the_dense_rung_did_not_take_from_the_donor_fails(
    name: str, source: str, dense: Converted, tmp_path: Path
) -> None:
    damaged = shutil.copytree(dense.payload, tmp_path / "payload")
    flip(damaged, name)
    verdict = dense.judge("rest_copied", damaged)
    assert not verdict.passed
    assert verdict.description == f"{name} is not {source} of donor"


def test_what_the_new_attention_left_alone_is_compared_as_it_is_stored(
    remade: Converted, tmp_path: Path
) -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    damaged = shutil.copytree(remade.payload, tmp_path / "payload")
    flip(damaged, name)
    verdict = remade.judge("rest_copied", damaged)
    assert not verdict.passed
    assert verdict.description == f"{name} is not {name} of parent"
    factors = shutil.copytree(remade.payload, tmp_path / "factors")
    flip(factors, "decoder.layers.0.self_attention.linear_tpa.a_q")
    assert remade.judge("rest_copied", factors).passed, "what was fitted is no copy"


def test_an_expert_that_speaks_or_a_shared_one_that_changed_fails(
    upcycled: Converted, tmp_path: Path
) -> None:
    prefix = "decoder.layers.2.mlp."
    for name, words in (
        (f"{prefix}experts.weight2", "is not zero"),
        (f"{prefix}shared_experts.linear_fc2.weight", f"is not {prefix}linear_fc2.weight of parent"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "is not decoder.layers.0.mlp.linear_fc1.weight"),
    ):
        damaged = shutil.copytree(upcycled.payload, tmp_path / name)
        flip(damaged, name)
        verdict = upcycled.judge("parent_kept", damaged)
        assert not verdict.passed
        assert verdict.description.startswith(f"{name} {words}")
    damaged = shutil.copytree(upcycled.payload, tmp_path / "noise")
    flip(damaged, f"{prefix}experts.weight1")
    assert upcycled.judge("parent_kept", damaged).passed, "experts start from noise; nothing is known of it"


def test_a_tensor_of_the_donor_that_changed_with_the_vocabulary_fails(
    respelled: Converted, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = shutil.copytree(respelled.payload, tmp_path / "payload")
    flip(damaged, name)
    verdict = respelled.judge("rest_copied", damaged)
    assert not verdict.passed
    assert verdict.description == f"{name} is not {name} of donor"
    flip(damaged, name)
    assert respelled.judge("rest_copied", damaged).passed
    embedding = shutil.copytree(respelled.payload, tmp_path / "embedding")
    rewrite(embedding, lambda header: header.pop("model.norm.weight"))
    assert not respelled.judge("weights_complete", embedding).passed


@pytest.mark.parametrize("rung", ["vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_table_that_checks_use_is_that_of_built_models(rung: str, dtype: str) -> None:
    from trainer.surgery.tensors import tensor_table

    architecture = load_experiment("smoke").architecture(rung)
    types = {"torch.float32": "F32", "torch.bfloat16": "BF16"}
    written = {
        name: (types[str(spec.dtype)], tuple(spec.shape))
        for name, spec in tensor_table(architecture, dtype).items()
    }
    assert dict(rung_tensors(architecture, dtype)) == written


def test_what_a_training_run_publishes_passes(tmp_path: Path) -> None:
    directory = publish_as(morphed(), tmp_path / "payload", "bf16")
    assert tensor_faults(directory, rung_tensors(morphed(), "bf16")) == []
    assert rung_config_faults(directory, morphed(), "bf16") == []
    assert tensor_faults(directory, rung_tensors(morphed(), "fp32"))


def test_rounding_to_bfloat16_is_that_of_torch(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from vpmoe_assets.donors.audit import copy_faults

    generator = np.random.default_rng(0)
    wide = torch.from_numpy(generator.standard_normal(5000).astype(np.float32) * 1e3)
    half = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3895314e38, 1e-40, -0.0])  # ties, ends
    tensors = {"a": wide, "b": half}
    for place, content in (
        ("wide", tensors),
        ("narrow", {name: tensor.bfloat16() for name, tensor in tensors.items()}),
    ):
        (tmp_path / place / "payload").mkdir(parents=True)
        save_file(content, tmp_path / place / "payload" / "model.safetensors")
    pairs = {"a": "a", "b": "b"}
    narrow, broad = tmp_path / "narrow" / "payload", tmp_path / "wide" / "payload"
    assert copy_faults(narrow, broad, pairs) == []
    assert copy_faults(broad, narrow, pairs) == ["a is not a of narrow", "b is not b of narrow"]
