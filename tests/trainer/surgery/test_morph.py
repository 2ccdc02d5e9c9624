import math
from pathlib import Path

import pytest
import torch

from tests.trainer.surgery.calibration_cases import VOCAB, compat, morphed, publish, write_text
from trainer.checkpoints.published import load_published
from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.job import Job
from trainer.contract.schema.rungs.ladder import parse_convert_recipe
from trainer.errors import DataError
from trainer.job.lifecycle import Interrupted
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.model.gpt import build_model
from trainer.model.positions import initial_log_freq
from trainer.model.qkv import split_qkv
from trainer.surgery import morph
from trainer.surgery.calibration import load_calibration
from trainer.surgery.step import Conversion, Outcome
from trainer.surgery.tensorfile import WeightsError
from trainer.surgery.weights import WeightsReader, WeightsWriter

TOKENS = 600


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A published parent and a text."""
    root = tmp_path_factory.mktemp("morph")
    write_text(root / "text", [70, 33, 120, 9, 250, 41, 90, 64])
    publish(compat(), root / "parent")
    return {"parent": root / "parent", "text": root / "text"}


def conversion(inputs: dict[str, Path], work: Path, *, seed: int = 11, result=None, **surgery) -> Conversion:
    recipe = {
        "step": "morph",
        "source": "parent",
        "text": "text",
        "parent": plain(compat()),
        "parent_dtype": "fp32",
        "architecture": plain(result or morphed()),
        "dtype": "fp32",
        "surgery": {
            "tpa_init": "als",
            "als_sweeps": 4,
            "softmax_offset_init": -4.0,
            "calibration_tokens": TOKENS,
        }
        | surgery,
    }
    job = Job.model_validate(
        {
            "schema": "vpmoe.job/1",
            "command": "convert",
            "asset": "vpdense_28",
            "experiment": "test",
            "recipe": recipe,
            "recipe_fingerprint": "f",
            "seed": seed,
            "inputs": {name: {"path": str(path), "digest": "d"} for name, path in inputs.items()},
            "execution": {"device": "cpu"},
            "provenance": {"git_sha": "g", "git_dirty": False, "source_digest": "s", "lock_digest": "l"},
            "work_dir": str(work),
            "output_dir": str(work / "out"),
        }
    )
    return Conversion(
        job=job,
        recipe=parse_convert_recipe(recipe),
        inputs=inputs,
        scratch=work,
        work=WorkDir(work),
        stop=StopRequest(),
    )


def run(job: Conversion, payload: Path, dtype: str = "fp32") -> Outcome:
    with WeightsWriter(payload, job.recipe.architecture, dtype) as out:
        outcome = morph.convert(job, out)
        out.finish()
    morph.check(job, payload, outcome)
    return outcome


@pytest.fixture(scope="module")
def result(inputs, tmp_path_factory):
    root = tmp_path_factory.mktemp("result")
    return root / "payload", run(conversion(inputs, root / "work"), root / "payload")


def local(name: str) -> bool:
    return any(name.startswith(f"decoder.layers.{index}.") for index in range(3))


def test_everything_but_local_projections_is_copied_bit_for_bit(inputs, result):
    with WeightsReader(inputs["parent"]) as parent, WeightsReader(result[0]) as morphed_:
        replaced = [name for name in parent.names if name not in morphed_]
        assert all(local(name) and ".linear_qkv." in name for name in replaced)
        assert len(replaced) == 6
        for name in set(parent.names) - set(replaced):
            assert morphed_.digest(name) == parent.digest(name), name
        assert "decoder.layers.3.self_attention.linear_qkv.weight" in morphed_
        for index in range(3):
            dense = f"decoder.layers.{index}.self_attention.linear_qkv.bias"
            composed = f"decoder.layers.{index}.self_attention.linear_tpa.bias"
            assert morphed_.digest(composed) == parent.digest(dense)


def test_new_constants_have_their_starting_values(result):
    with WeightsReader(result[0]) as reader:
        assert torch.equal(reader.read("rotary_pos_emb.log_freq"), initial_log_freq(8, 1e6, 16.0))
        for index in range(4):
            prefix = f"decoder.layers.{index}.self_attention."
            assert torch.equal(reader.read(prefix + "core_attention.softmax_offset"), torch.full((4,), -4.0))
            if index:
                logit = reader.read(prefix + "value_residual_logit")
                assert logit.item() == pytest.approx(math.log(0.99 / 0.01), rel=1e-6)
        assert "decoder.layers.0.self_attention.value_residual_logit" not in reader


def test_result_loads_into_a_model_of_its_architecture(result):
    model = build_model(morphed())
    load_published(model, result[0], architecture=morphed())


def test_reported_errors_are_those_of_the_built_modules(inputs, result):
    """Parent and result as whole models, their projections on the parent's own inputs, through hooks."""
    payload, outcome = result
    parent, student = build_model(compat()).eval(), build_model(morphed()).eval()
    load_published(parent, inputs["parent"])
    load_published(student, payload)
    calibration = load_calibration(inputs["text"], tokens=TOKENS, seq_len=64, seed=11)
    sums = {(layer, p): [0.0, 0.0] for layer in range(3) for p in "qkv"}

    def hook(layer):
        def compare(_module, args, output):
            z = args[0]
            bias = parent.decoder.layers[layer].self_attention.linear_qkv.bias
            dense = split_qkv(output[0] - bias, 2, 8)
            ours = split_qkv(student.decoder.layers[layer].self_attention.linear_tpa(z)[0] - bias, 2, 8)
            for p, target, fitted in zip("qkv", dense, ours, strict=True):
                sums[layer, p][0] += float((fitted - target).double().square().sum())
                sums[layer, p][1] += float(target.double().square().sum())

        return compare

    for layer in range(3):
        parent.decoder.layers[layer].self_attention.linear_qkv.register_forward_hook(hook(layer))
    with torch.no_grad():
        for batch in calibration.batches():
            parent(batch.tokens, batch.position_ids, batch.doc_id)
    for (layer, p), (off, power) in sums.items():
        assert outcome.layers[layer][f"{p}_relative_mse"] == pytest.approx(off / power, rel=1e-3)
        assert (
            outcome.layers[layer][f"{p}_relative_mse"] < outcome.layers[layer][f"{p}_relative_mse_at_start"]
        )


def test_report_has_one_row_a_layer_with_equal_keys(result):
    _, outcome = result
    assert [row["layer"] for row in outcome.layers] == [1, 2, 3, 4]
    assert [row["kind"] for row in outcome.layers] == ["local", "local", "local", "global"]
    assert len({tuple(row) for row in outcome.layers}) == 1
    assert outcome.layers[3]["q_relative_mse"] is None
    assert all(-1.0 <= row["cosine_to_parent"] <= 1.0 for row in outcome.layers)
    assert outcome.transform["fitted_layers"] == [1, 2, 3]
    assert outcome.transform["calibration"]["tokens"] == TOKENS


def test_cross_entropies_are_those_of_the_whole_models(inputs, result):
    payload, outcome = result
    metadata = outcome.checks["finite_logits"].metadata
    calibration = load_calibration(inputs["text"], tokens=TOKENS, seq_len=64, seed=11)
    for key, architecture, directory in (
        ("parent_cross_entropy", compat(), inputs["parent"]),
        ("cross_entropy", morphed(), payload),
    ):
        model = build_model(architecture).eval()
        load_published(model, directory)
        losses = []
        for batch in calibration.batches():
            with torch.no_grad():
                logits = model(batch.tokens, batch.position_ids, batch.doc_id)
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-1, reduction="none"
                )[batch.labels.flatten() >= 0]
            )
        assert metadata[key] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert metadata["ln_vocab_size"] == pytest.approx(math.log(VOCAB))
    assert outcome.checks["finite_logits"].passed
    assert outcome.checks["better_than_guessing"].passed == (metadata["cross_entropy"] < math.log(VOCAB))


def test_same_inputs_and_seed_give_the_same_bytes(inputs, result, tmp_path):
    again = run(conversion(inputs, tmp_path / "work"), tmp_path / "payload")
    assert again.layers == result[1].layers
    for path in sorted(result[0].iterdir()):
        assert (tmp_path / "payload" / path.name).read_bytes() == path.read_bytes()


def test_fitted_factors_beat_fresh_ones(inputs, result, tmp_path):
    fresh = run(conversion(inputs, tmp_path / "work", tpa_init="random"), tmp_path / "payload")
    for drawn, fitted in zip(fresh.layers[:3], result[1].layers[:3], strict=True):
        assert drawn["q_relative_mse_at_start"] is None
        for p in "qkv":
            assert fitted[f"{p}_relative_mse"] < drawn[f"{p}_relative_mse"]
    with WeightsReader(tmp_path / "payload") as reader:
        factor = reader.read("decoder.layers.0.self_attention.linear_tpa.b_q")
        assert factor.std().item() == pytest.approx(0.02, rel=0.1)


def test_rung_in_bf16_keeps_its_fp32_tensors(inputs, tmp_path):
    job = conversion(inputs, tmp_path / "work")
    run(job, tmp_path / "payload", dtype="bf16")
    with WeightsReader(tmp_path / "payload") as reader:
        assert reader.specs["rotary_pos_emb.log_freq"].dtype == torch.float32
        assert reader.specs["decoder.layers.1.self_attention.linear_tpa.a_q"].dtype == torch.bfloat16


def test_parent_of_another_geometry_is_refused(inputs, tmp_path):
    publish(morphed(), tmp_path / "parent")
    job = conversion(inputs | {"parent": tmp_path / "parent"}, tmp_path / "work")
    with pytest.raises(WeightsError, match="softmax_type"):
        run(job, tmp_path / "payload")


def test_short_text_is_refused(inputs, tmp_path):
    job = conversion(inputs, tmp_path / "work", calibration_tokens=10_000)
    with pytest.raises(DataError, match="calibration_tokens = 10000"):
        run(job, tmp_path / "payload")


def test_tensor_without_a_rule_is_refused(inputs, tmp_path):
    """A result without its query and key norms would silently drop trained gains."""
    job = conversion(inputs, tmp_path / "work")
    lost = morphed(qk_layernorm=False)
    object.__setattr__(job, "recipe", job.recipe.model_copy(update={"architecture": lost}))
    with pytest.raises(ConfigError, match=r"would lose 8 of the parent"):
        run(job, tmp_path / "payload")


def test_stop_request_ends_the_fit(inputs, tmp_path):
    job = conversion(inputs, tmp_path / "work")
    job.stop.request("SIGTERM")
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(job, tmp_path / "payload")
