import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.surgery.calibration_cases import donor, write_text
from trainer.surgery.calibration import load_calibration
from trainer.surgery.refit import NarrowFfn, NormalEquations, refit_layers
from trainer.surgery.streams import DonorStream
from trainer.surgery.weights import WeightsReader


def problem(tokens: int, features: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared activations of very different scales, and outputs with an offset."""
    generator = np.random.default_rng(seed)
    x = np.maximum(generator.normal(size=(tokens, features)), 0) ** 2 * 10.0 ** generator.integers(
        -3, 3, features
    )
    return x, generator.normal(size=(tokens, outputs)) + 3.0


def summed(x: np.ndarray, y: np.ndarray, chunk: int = 17) -> NormalEquations:
    sums = NormalEquations(x.shape[1], y.shape[1])
    for start in range(0, len(x), chunk):
        sums.add(torch.from_numpy(x[start : start + chunk]), torch.from_numpy(y[start : start + chunk]))
    return sums


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), features=st.integers(1, 8), chunk=st.integers(1, 100))
def test_without_a_ridge_it_is_least_squares(seed, features, chunk):
    x, y = problem(80, features, 3, seed)
    weight, bias = summed(x, y, chunk).solve(0.0)
    design = np.hstack([x, np.ones((80, 1))])
    # Columns brought to one scale first, or lstsq's own cutoff would drop the small ones.
    scale = np.linalg.norm(design, axis=0)
    expected = np.linalg.lstsq(design / scale, y, rcond=None)[0] / scale[:, None]
    np.testing.assert_allclose(
        weight.numpy() * scale[:-1], expected[:-1].T * scale[:-1], rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(bias.numpy(), expected[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 10.0])
def test_ridge_equals_augmented_least_squares(ridge):
    """Rows √(ridge · s_i) e_i appended to the design, with target zero: the bias is free."""
    x, y = problem(60, 5, 4, 1)
    weight, bias = summed(x, y).solve(ridge)
    penalty = np.hstack([np.diag(np.sqrt(ridge * (x**2).sum(0))), np.zeros((5, 1))])
    design = np.vstack([np.hstack([x, np.ones((60, 1))]), penalty])
    scale = np.linalg.norm(design, axis=0)
    expected = (
        np.linalg.lstsq(design / scale, np.vstack([y, np.zeros((5, 4))]), rcond=None)[0] / scale[:, None]
    )
    np.testing.assert_allclose(
        weight.numpy() * scale[:-1], expected[:-1].T * scale[:-1], rtol=1e-7, atol=1e-9
    )
    np.testing.assert_allclose(bias.numpy(), expected[-1], rtol=1e-7, atol=1e-9)


def test_relative_mse_is_that_of_the_residuals():
    x, y = problem(60, 5, 4, 2)
    sums = summed(x, y)
    generator = np.random.default_rng(0)
    w, b = generator.normal(size=(4, 5)), generator.normal(size=4)
    expected = ((x @ w.T + b - y) ** 2).sum() / (y**2).sum()
    assert sums.relative_mse(torch.from_numpy(w), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-10)
    assert sums.relative_mse(torch.zeros(4, 5), torch.zeros(4)) == pytest.approx(1.0)


def test_collinear_and_silent_features_are_harmless():
    x, y = problem(60, 4, 2, 3)
    wide = np.hstack([x, x[:, :1], np.zeros((60, 2))])
    narrow, wider = summed(x, y), summed(wide, y)
    for ridge in (0.0, 1e-8):
        weight, bias = wider.solve(ridge)
        assert torch.equal(weight[:, 5:], torch.zeros(2, 2, dtype=torch.float64))
        assert wider.relative_mse(weight, bias) == pytest.approx(
            narrow.relative_mse(*narrow.solve(ridge)), rel=1e-6
        )
    assert wider.silent == 2


def test_empty_or_broken_sums_are_refused():
    with pytest.raises(ValueError, match="no calibration token"):
        NormalEquations(3, 2).solve(1e-8)
    sums = NormalEquations(1, 1)
    sums.add(torch.full((2, 1), float("inf")), torch.ones(2, 1))
    with pytest.raises(ValueError, match="not finite"):
        sums.solve(1e-8)
    silent = NormalEquations(1, 1)
    silent.add(torch.ones(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="outputs are zero"):
        silent.relative_mse(torch.ones(1, 1), torch.zeros(1))


@pytest.fixture
def batches(tmp_path):
    write_text(tmp_path / "text", [70, 33, 120, 9, 250, 41, 90, 64])
    return load_calibration(tmp_path / "text", tokens=650, seq_len=64, seed=3).batches()


def test_donor_that_relu_squared_can_express_is_recovered(tmp_path, batches):
    """Gate = up and a ReLU: ``relu(Wz) · Wz = relu(Wz)²``; the neurons that are left out do nothing."""
    model = donor(tmp_path / "donor", act="relu")
    chosen = torch.arange(0, 24, 2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.up_proj.weight)
            layer.mlp.down_proj.weight[:, 1::2] = 0.0
    model.save_pretrained(tmp_path / "donor")

    def narrow(number: int) -> NarrowFfn:
        mlp = model.model.layers[number - 1].mlp
        return NarrowFfn(mlp.up_proj.weight.detach()[chosen], torch.zeros(12), torch.zeros(32, 12))

    with WeightsReader(tmp_path / "donor") as reader:
        stream = DonorStream(tmp_path / "donor", reader.read, batches)
        fits = dict(refit_layers(stream, narrow, ridge=1e-8))
    assert sorted(fits) == [1, 2, 3]
    for number, fit in fits.items():
        down = model.model.layers[number - 1].mlp.down_proj.weight.detach()[:, chosen]
        assert fit.relative_mse_before == pytest.approx(1.0)
        assert fit.relative_mse_after < 1e-10
        torch.testing.assert_close(fit.weight.float(), down, rtol=0, atol=1e-4 * down.abs().max().item())
        assert fit.bias.abs().max() < 1e-4 * (down.abs().max())


def test_refit_lowers_the_error_of_the_kept_columns_as_far_as_lstsq_does(tmp_path, batches):
    model = donor(tmp_path / "donor")
    kept = torch.arange(10)

    def narrow(number: int) -> NarrowFfn:
        mlp = model.model.layers[number - 1].mlp
        return NarrowFfn(mlp.up_proj.weight.detach()[kept], None, mlp.down_proj.weight.detach()[:, kept])

    with WeightsReader(tmp_path / "donor") as reader:
        stream = DonorStream(tmp_path / "donor", reader.read, batches)
        fits = dict(refit_layers(stream, narrow, ridge=0.0))
        stream = DonorStream(tmp_path / "donor", reader.read, batches)
        for number, fit in fits.items():
            seen: list[tuple[torch.Tensor, torch.Tensor]] = []
            stream.run(stream.load(number), observe_ffn=lambda z, y, seen=seen: seen.append((z, y)))
            z, y = (torch.cat(part).double().numpy() for part in zip(*seen, strict=True))
            ffn = narrow(number)
            x = np.maximum(z @ ffn.fc1_weight.double().numpy().T, 0) ** 2
            down = ffn.fc2_weight.double().numpy()
            power = (y**2).sum()
            assert fit.relative_mse_before == pytest.approx(((x @ down.T - y) ** 2).sum() / power, rel=1e-4)
            design = np.hstack([x, np.ones((len(x), 1))])
            best = np.linalg.lstsq(design, y, rcond=None)[0]
            expected = ((design @ best - y) ** 2).sum() / power
            assert fit.relative_mse_after == pytest.approx(expected, rel=1e-4)
            assert fit.relative_mse_after < min(1.0, fit.relative_mse_before)
