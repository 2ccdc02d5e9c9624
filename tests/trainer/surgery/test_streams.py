import math

import numpy as np
import pytest
import torch

from tests.trainer.surgery.calibration_cases import EOD, VOCAB, compat, donor, morphed, publish
from trainer.checkpoints.published import load_published
from trainer.contract.schema.base import ConfigError
from trainer.model.gpt import build_model
from trainer.surgery.calibration import Calibration
from trainer.surgery.streams import DonorStream, StudentStream, residual_agreement
from trainer.surgery.weights import WeightsReader


def calibration(
    lengths: tuple[int, ...] = (20, 7, 30, 18), seq_len: int = 24, high: int = EOD
) -> Calibration:
    generator = np.random.default_rng(3)
    documents = [np.append(generator.integers(1, high, size=n - 1), EOD) for n in lengths]
    return Calibration(np.concatenate(documents).astype(np.int32), seq_len, len(lengths), EOD, 0)


def run_all(stream) -> None:
    for number in range(1, stream.layers + 1):
        stream.run(stream.load(number))


@pytest.mark.parametrize("architecture", [compat(), morphed()], ids=["compat", "morphed"])
def test_student_layer_by_layer_equals_the_whole_model(architecture, tmp_path):
    """With a short last row, several batches, value residual and learnt frequencies."""
    publish(architecture, tmp_path / "rung")
    whole = build_model(architecture).eval()
    load_published(whole, tmp_path / "rung")
    batches = calibration().batches(batch_tokens=24)
    assert len({batch.tokens.shape for batch in batches}) == 2
    with WeightsReader(tmp_path / "rung") as reader:
        stream = StudentStream(architecture, reader.read, batches)
        run_all(stream)
        losses = []
        for batch, hidden in zip(batches, stream.hidden, strict=True):
            with torch.no_grad():
                expected = whole.forward_hidden(batch.tokens, batch.position_ids, batch.doc_id)
                logits = whole(batch.tokens, batch.position_ids, batch.doc_id)
            normed = whole.decoder.final_layernorm(hidden)
            torch.testing.assert_close(normed, expected, rtol=1e-6, atol=1e-6)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-1, reduction="none"
            )
            losses.append(loss[batch.labels.flatten() != -1])
        total = torch.cat(losses)
        assert stream.cross_entropy(1000) == pytest.approx(total.mean().item(), rel=1e-5)
        assert stream.cross_entropy(10) == pytest.approx(total[:10].mean().item(), rel=1e-5)


def test_donor_layer_by_layer_equals_transformers_on_each_document(tmp_path):
    """Packed rows give what transformers gives for the documents alone: nothing is seen across an EOD."""
    model = donor(tmp_path)
    lengths = (20, 7, 13)
    batch = calibration(lengths, seq_len=40).batches()[0]
    states = []
    for part in batch.tokens[0].split(lengths):
        with torch.no_grad():
            output = model.model.layers, model.model(input_ids=part[None], output_hidden_states=True)
        states.append(torch.stack([state[0] for state in output[1].hidden_states]))
    expected = torch.cat(states, dim=1)  # [layers + 1, S, H], the last one behind the final norm
    with WeightsReader(tmp_path) as reader:
        stream = DonorStream(tmp_path, reader.read, [batch])
        assert stream.layers == 3
        for number in range(1, 4):
            torch.testing.assert_close(stream.hidden[0][0], expected[number - 1], rtol=1e-5, atol=1e-5)
            stream.run(stream.load(number))
        with torch.no_grad():
            torch.testing.assert_close(
                model.model.norm(stream.hidden[0][0]), expected[3], rtol=1e-5, atol=1e-5
            )


def test_observer_sees_the_inputs_and_outputs_of_the_donors_ffn(tmp_path):
    model = donor(tmp_path)
    seen = []
    with WeightsReader(tmp_path) as reader:
        stream = DonorStream(tmp_path, reader.read, calibration().batches(batch_tokens=24))
        for number in (1, 2):
            stream.run(stream.load(number), observe_ffn=lambda z, y: seen.append((z, y)))
    assert sum(len(z) for z, _ in seen) == 2 * calibration().tokens
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[1].mlp(seen[-1][0]), seen[-1][1], rtol=1e-5, atol=1e-6)


def test_agreement_is_the_cosine_of_the_streams(tmp_path):
    batches = calibration().batches()
    publish(compat(), tmp_path / "a", seed=1)
    publish(compat(), tmp_path / "b", seed=2)
    with WeightsReader(tmp_path / "a") as a, WeightsReader(tmp_path / "b") as b:

        def stream(reader):
            return StudentStream(compat(), reader.read, batches)

        same = list(residual_agreement(stream(a), stream(a)))
        assert [row["layer"] for row in same] == [1, 2, 3, 4]
        assert all(row["cosine"] == pytest.approx(1.0, abs=1e-6) for row in same)
        rows = list(residual_agreement(stream(a), stream(b)))
        left, right = stream(a), stream(b)
        for row in rows:
            for each in (left, right):
                each.run(each.load(int(row["layer"])))
            x = np.concatenate([part.numpy() for part in left.residual()]).astype(np.float64)
            y = np.concatenate([part.numpy() for part in right.residual()]).astype(np.float64)
            cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
            assert row["cosine"] == pytest.approx(cosines.mean(), rel=1e-6)
            assert row["norm_ratio"] == pytest.approx(math.sqrt((x**2).sum() / (y**2).sum()), rel=1e-6)


def test_student_and_donor_of_equal_shape_can_be_compared(tmp_path):
    donor(tmp_path / "donor", layers=4)
    publish(compat(), tmp_path / "student")
    batches = calibration().batches()
    with WeightsReader(tmp_path / "donor") as theirs, WeightsReader(tmp_path / "student") as ours:
        rows = list(
            residual_agreement(
                StudentStream(compat(), ours.read, batches),
                DonorStream(tmp_path / "donor", theirs.read, batches),
            )
        )
    assert all(-1.0 <= row["cosine"] <= 1.0 for row in rows)


def test_models_of_different_depth_cannot_be_compared(tmp_path):
    donor(tmp_path / "donor", layers=3)
    publish(compat(), tmp_path / "student")
    batches = calibration().batches()
    with WeightsReader(tmp_path / "donor") as theirs, WeightsReader(tmp_path / "student") as ours:
        student = StudentStream(compat(), ours.read, batches)
        other = DonorStream(tmp_path / "donor", theirs.read, batches)
        with pytest.raises(ConfigError, match="cannot be compared"):
            next(residual_agreement(student, other))


def test_text_of_another_tokenizer_is_refused(tmp_path):
    publish(compat(), tmp_path / "student")
    with WeightsReader(tmp_path / "student") as reader, pytest.raises(ConfigError, match=f"has {VOCAB} rows"):
        StudentStream(compat(), reader.read, calibration(high=5000).batches())


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    publish(compat(), tmp_path / "student")
    wider = compat().model_copy(update={"model": compat().model.model_copy(update={"ffn_hidden_size": 13})})
    with WeightsReader(tmp_path / "student") as reader:
        stream = StudentStream(wider, reader.read, calibration().batches())
        with pytest.raises(ConfigError, match=r"linear_fc1.*\[13.*expected.*\[12"):
            stream.load(1)


def test_donor_of_another_family_is_refused(tmp_path):
    donor(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"model_type": "qwen3"', '"model_type": "llama"'))
    with WeightsReader(tmp_path) as reader, pytest.raises(ConfigError, match="llama"):
        DonorStream(tmp_path, reader.read, calibration().batches())
