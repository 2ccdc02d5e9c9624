"""A teacher's answers for tests: distributions of numpy's, sorted and cut here by the plainest means."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.records import TopKRecords

IDENTITY = StoreIdentity(
    teacher={"kind": "artifact", "digest": "t", "reasoning_mode": "high"},
    tokenizer_sha256="o200k",
    dataset_digest="kd",
    subset_fraction=0.5,
    vocabulary=100,
    topk=8,
    tail_draws=2,
)
ADAPTIVE = replace(IDENTITY, mass=0.4)


def answer(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], identity: StoreIdentity, seed: int = 0
) -> TopKRecords:
    """What a teacher with these distributions `[n, V]` gives for these labels `[n]`."""
    rng = np.random.default_rng(seed)
    n, topk = len(probabilities), identity.topk
    with np.errstate(divide="ignore"):
        logprobs = np.log(probabilities).astype(np.float32)
    records = TopKRecords(
        logprobs[np.arange(n), labels],
        np.full((n, topk), -1, np.int32),
        np.full((n, topk), -np.inf, np.float32),
        np.zeros(n, np.float32),
        np.full((n, identity.tail_draws), -1, np.int32),
    )
    for position, row in enumerate(probabilities):
        order = sorted(range(len(row)), key=lambda token: (-row[token], token))[:topk]
        order = [token for token in order if row[token] > 0]
        if identity.mass is not None:
            mass = np.cumsum(row[order])
            order = order[: int(np.searchsorted(mass, identity.mass)) + 1]
        records.ids[position, : len(order)] = order
        records.logprobs[position, : len(order)] = logprobs[position, order]
        rest = np.array(row)
        rest[order] = 0
        records.tail_mass[position] = rest.sum()
        if identity.tail_draws and records.tail_mass[position] > 0:
            records.draws[position] = rng.choice(len(row), identity.tail_draws, p=rest / rest.sum())
    return records


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distributions of logits `[n, V]`."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def records(rng: np.random.Generator, n: int, identity: StoreIdentity = IDENTITY) -> TopKRecords:
    """Records of n random distributions."""
    probabilities = softmax(2 * rng.normal(size=(n, identity.vocabulary)))
    return answer(probabilities, rng.integers(0, identity.vocabulary, n), identity)


def assert_within(found: TopKRecords, given: TopKRecords, error: float) -> None:
    """What is read is what was written: ids exactly, log-probs within the bound, no mass above 1."""
    np.testing.assert_array_equal(found.ids, given.ids)
    np.testing.assert_array_equal(found.draws, given.draws)
    for name in ("logprobs", "label_logprob"):
        one, other = getattr(found, name), getattr(given, name)
        assert one.dtype == np.float32
        np.testing.assert_array_equal(np.isinf(one), np.isinf(other))
        one, other = one[np.isfinite(one)].astype(float), other[np.isfinite(one)].astype(float)
        rounding = np.abs(other) * 2.0**-22  # of the numbers themselves, which are float32
        np.testing.assert_array_less(np.abs(one - other), error + rounding + 1e-12)
    np.testing.assert_array_equal(found.tail_mass > 0, given.tail_mass > 0)
    tail = given.tail_mass > 1e-37  # below, float32 itself has no digits left
    np.testing.assert_array_less(
        np.abs(np.log(found.tail_mass[tail].astype(float)) - np.log(given.tail_mass[tail].astype(float))),
        error + 1e-5,
    )
    mass = np.exp(found.logprobs.astype(float)).sum(axis=1) + found.tail_mass
    assert (mass <= 1 + 1e-7).all()
