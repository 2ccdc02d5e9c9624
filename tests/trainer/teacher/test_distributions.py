"""What is stored of a distribution, against the whole of it in float64, across tiles, chunks and threads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from tests.trainer.teacher.teachers import naive
from trainer.evaluate.models import LanguageModel
from trainer.teacher import distributions as module

CPU = torch.device("cpu")


def head_of(weight, bias=None):
    """A model that is an output head."""
    model = SimpleNamespace(device=CPU, vocab_size=len(weight), head=(weight, bias))
    model.head_logits = lambda hidden, **where: LanguageModel.head_logits(model, hidden, **where)
    return model


@pytest.fixture(params=[(12, 1), (1, 3)], ids=["head as it lies", "head laid out, but for the last chunk"])
def narrow(monkeypatch, request):
    """Tiles that end in a padded block, chunks of three rows that two threads share."""
    monkeypatch.setattr(module, "_TILE", {"cpu": 1024})
    for name, positions in zip(("_MANY", "_FEW"), request.param, strict=True):
        monkeypatch.setattr(module, name, positions)
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": 3 * 2900})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(("topk", "mass"), [(6, None), (6, 0.5), (0, None), (900, None), (2900, None)])
@pytest.mark.parametrize("scale", [0.1, 4.0])  # all alike, and all but certain
def test_numbers_and_draws_are_those_of_the_whole_distribution(topk, mass, scale, narrow):
    seeded = torch.Generator().manual_seed(int(topk + 10 * scale))
    weight, bias = torch.randn(2900, 16, generator=seeded), torch.randn(2900, generator=seeded)
    hidden = scale * torch.randn(11, 16, generator=seeded)
    labels = torch.randint(0, 2900, (11,), generator=seeded)
    chances = module.uniforms([4], [11], 5)
    found = module.distributions(head_of(weight, bias), hidden, labels, topk, mass=mass, chances=chances)
    logits = (hidden.double() @ weight.double().T + bias.double()).numpy()
    for row, label in enumerate(labels.tolist()):
        at_label, ids, logprobs, tail = naive(logits[row], label, topk, mass)
        assert found.label_logprob[row] == pytest.approx(at_label, abs=2e-5)
        if topk < 900:  # further down neighbours are closer than round-off
            assert found.ids[row].tolist() == ids + [-1] * (topk - len(ids))
        np.testing.assert_allclose(found.logprobs[row, : len(ids)], logprobs, atol=2e-5)
        # Relative: the tail is summed, not what is left of 1.
        assert found.tail_mass[row] == pytest.approx(tail, rel=2e-5)
        rest = np.exp(logits[row] - logits[row].max())
        rest[found.ids[row][found.ids[row] >= 0]] = 0
        if not rest.any():
            assert (found.draws[row] == -1).all()
            continue
        ends = rest.cumsum() / rest.sum()
        drawn = found.draws[row]
        assert (rest[drawn] > 0).all()
        assert (ends[drawn] > chances[row] - 1e-6).all()
        assert (np.where(drawn > 0, ends[drawn - 1], 0) < chances[row] + 1e-6).all()


def test_threads_change_no_bit(narrow):
    seeded = torch.Generator().manual_seed(0)
    model, hidden = head_of(torch.randn(2900, 16, generator=seeded)), torch.randn(11, 16, generator=seeded)
    labels, chances = torch.arange(11), module.uniforms([4], [11], 5)
    several = module.distributions(model, hidden, labels, 8, chances=chances)
    torch.set_num_threads(1)
    alone = module.distributions(model, hidden, labels, 8, chances=chances)
    torch.set_num_threads(2)
    for name, values in vars(several).items():
        assert np.array_equal(values, getattr(alone, name)), name


@pytest.mark.parametrize("vocab", [40, 1300])
def test_draws_come_from_the_tail_by_its_probabilities(vocab):
    draw = np.random.default_rng(vocab)
    logits = np.full((1, vocab), -12.0, np.float32)
    alive = draw.choice(vocab, size=24, replace=False)
    logits[0, alive] = draw.normal(0, 1.5, size=24)
    many = 8_000
    chances = module.uniforms([9], [1], many)
    model = head_of(torch.from_numpy(logits.T.copy()))
    scores = module.distributions(model, torch.ones(1, 1), torch.tensor([0]), 4, chances=chances)
    probabilities = np.exp(logits[0].astype(np.float64))
    probabilities[scores.ids[0]] = 0.0
    expected = probabilities / probabilities.sum() * many
    counts = np.bincount(scores.draws[0], minlength=vocab)
    assert counts[scores.ids[0]].sum() == 0
    seen = expected > 5
    found = stats.chisquare(
        np.append(counts[seen], counts[~seen].sum()), np.append(expected[seen], expected[~seen].sum())
    )
    assert found.pvalue > 1e-4


def test_rows_of_a_key_are_numbered_and_in_the_unit_interval():
    one = module.uniforms([5, 7], [3, 0], 4)
    assert np.array_equal(module.uniforms([7, 5], [2, 6], 4)[2:5], one)
    assert ((one >= 0) & (one < 1)).all()
    assert not np.array_equal(module.uniforms([5 + 2**64], [3], 4), one)
