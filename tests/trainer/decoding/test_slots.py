"""Static slots against sequences that run in batches of their own."""

import dataclasses
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.model.model_cases import VOCAB, randomize, tiny
from trainer.decoding import generation
from trainer.decoding.generation import evaluating, generate
from trainer.decoding.sampling import GREEDY, Sampling
from trainer.decoding.slots import Slots, forget_slots, slots_of
from trainer.model.gpt import build_model

KINDS = ["compat", "dense", "moe"]
FILTERED = Sampling(temperature=1.2, top_k=40, top_p=0.95)


@functools.cache
def models(kind: str):
    """One model twice, with the same weights: in batches, and in slots."""
    batched, slotted = (randomize(build_model(tiny(kind))).eval() for _ in range(2))
    slotted.backend = dataclasses.replace(slotted.backend, slots=True)
    return batched, slotted


def require_same(found, expected):
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.finish for one in found] == [one.finish for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=9)


@settings(max_examples=7, deadline=None)
@given(
    asked=prompts,
    kind=st.sampled_from(KINDS),
    sampling=st.sampled_from([GREEDY, Sampling(1.0), FILTERED]),
    stop=st.sets(st.integers(0, VOCAB - 1), max_size=12),
    rows=st.integers(1, 4),
    new_tokens=st.integers(1, 24),
)
def test_tokens_are_those_of_batches_whatever_came_before_in_a_slot(
    asked, kind, sampling, stop, rows, new_tokens
):
    batched, slotted = models(kind)
    asked = [*asked, asked[0]]
    same = {"max_new_tokens": new_tokens, "stop": stop, "sampling": sampling, "seeds": range(len(asked))}
    require_same(generate(slotted, asked, rows=rows, **same), generate(batched, asked, **same))


def test_a_slot_that_was_full_of_another_sequence_shows_nothing_of_it():
    _, slotted = models("dense")
    forget_slots(slotted)
    asked = [[9, 8, 7], [1] * 40, [5, 6], [2] * 33]
    alone = [generate(slotted, [one], max_new_tokens=9, rows=1)[0] for one in asked]
    forget_slots(slotted)
    together = generate(slotted, asked, max_new_tokens=9, rows=1)
    assert together == alone  # one slot, so to the bit


def test_places_are_given_to_those_who_wait_while_others_go_on(monkeypatch):
    _, slotted = models("moe")
    monkeypatch.setattr(generation, "LOOK_EVERY", 2)
    admitted = []
    admit = Slots.admit

    def spy(self, slots, prompts, draws):
        admitted.append((list(slots), int(self._running.sum())))
        admit(self, slots, prompts, draws)

    monkeypatch.setattr(Slots, "admit", spy)
    asked = [[number] for number in range(1, 13)]
    same = {"max_new_tokens": 20, "rows": 4, "sampling": Sampling(1.0), "seeds": range(12)}
    free = generate(slotted, asked, **same)
    stop = {one.ids[place] for one, place in zip(free, (1, 5, 12), strict=False)}
    admitted.clear()
    made = generate(slotted, asked, stop=stop, **same)
    assert sum(len(slots) for slots, _ in admitted) == len(asked)
    assert any(running for _, running in admitted), "every batch ran to its end before the next began"
    for one, whole in zip(made, free, strict=True):
        ends = [place for place, token in enumerate(whole.ids) if token in stop]
        assert one.ids == whole.ids[: ends[0] + 1 if ends else None]


def test_prompts_that_are_too_many_for_one_pass_take_several(monkeypatch):
    batched, slotted = models("dense")
    asked = [[3] * length for length in (2, 9, 11, 20, 31)]
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 40)
    require_same(generate(slotted, asked, max_new_tokens=6), generate(batched, asked, max_new_tokens=6))


def test_what_is_watched_is_what_is_made_in_order_and_work_can_be_ended_between_steps():
    _, slotted = models("moe")
    seen: dict[int, list[int]] = {}
    asked = [[4, 5], [6], [7, 8, 9], [10]]
    made = generate(
        slotted,
        asked,
        max_new_tokens=20,
        rows=2,
        watch=lambda number, token: seen.setdefault(number, []).append(token),
    )
    assert [tuple(seen[number]) for number in range(4)] == [one.ids for one in made]

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(slotted, asked, max_new_tokens=20, between=stop)
    assert generate(slotted, asked, max_new_tokens=20, rows=2) == made


def test_logits_that_are_not_finite_are_refused():
    slotted = randomize(build_model(tiny("dense"))).eval()
    slotted.backend = dataclasses.replace(slotted.backend, slots=True)
    with torch.no_grad():
        slotted.head_weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="logits of row 0 are not finite"):
        generate(slotted, [[1, 2]], max_new_tokens=3)


def test_slots_are_kept_while_they_serve_and_go_with_their_model():
    model = randomize(build_model(tiny("dense"))).eval()
    asked = {"count": 2, "capacity": 40, "room": 8, "sampling": GREEDY}
    with evaluating(model):
        first = slots_of(model, **asked)
        assert slots_of(model, **(asked | {"capacity": 30, "room": 4})) is first
        assert slots_of(model, **(asked | {"sampling": FILTERED})) is not first
        kept = slots_of(model, **asked)
        model.head_weight.data = model.head_weight.data.clone()  # a graph would read the old weights
        assert slots_of(model, **asked) is not kept
    gone = weakref.ref(slots_of(model, **asked))
    del first, kept, model
    gc.collect()
    assert gone() is None
