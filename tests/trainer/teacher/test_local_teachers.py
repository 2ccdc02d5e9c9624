"""Teachers in memory against whole forward passes and NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.teacher.teachers import WINDOW, module_logits, naive, write_mxfp4
from trainer.errors import TeacherError
from trainer.teacher import distributions as module
from trainer.teacher.local import LocalTeacher
from trainer.teacher.opening import open_teacher
from trainer.teacher.rows import batches, plan
from trainer.teacher.teacher import TailDraws
from trainer.teacher.transformers_teacher import TransformersTeacher

CPU = torch.device("cpu")
TEACHERS = ["llama", "gpt_oss", "student"]


def conversations(seed=0, *, count=5, prompt=9, vocab=250):
    """Sequences of unequal length and the positions behind their prompts."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(prompt + 2, prompt + 30, size=count)
    tokens = [draw.integers(0, vocab, size=length).tolist() for length in lengths]
    return tokens, [range(prompt - 1, length - 1) for length in lengths]


def logits_of(teacher, tokens):
    if isinstance(teacher, TransformersTeacher):
        return module_logits(teacher.model.module, tokens)
    return teacher.model.logits(torch.tensor([tokens]), torch.tensor([len(tokens)]))[0].numpy()


def same(ours, theirs, atol=2e-5):
    np.testing.assert_allclose(ours.label_logprob, theirs.label_logprob, atol=atol)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=atol)
    np.testing.assert_allclose(ours.tail_mass, theirs.tail_mass, atol=atol)


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("mass", [None, 0.6])
def test_scores_are_those_of_the_whole_distribution(name, mass, request):
    teacher = request.getfixturevalue(name)
    sequences, wanted = conversations(count=1 if name == "student" else 2)
    for tokens, at, scores in zip(
        sequences, wanted, teacher.score(sequences, wanted, 6, mass=mass), strict=True
    ):
        logits = logits_of(teacher, tokens)
        for row, place in list(enumerate(at))[:: 1 if len(logits[0]) < 1000 else 6]:
            label, ids, logprobs, tail = naive(logits[place], tokens[place + 1], 6, mass)
            assert scores.label_logprob[row] == pytest.approx(label, abs=2e-5)
            assert scores.ids[row].tolist() == ids + [-1] * (6 - len(ids))
            np.testing.assert_allclose(scores.logprobs[row, : len(ids)], logprobs, atol=2e-5)
            assert np.isneginf(scores.logprobs[row, len(ids) :]).all()
            assert scores.tail_mass[row] == pytest.approx(tail, abs=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_completions_of_one_prompt_are_scored_as_if_each_stood_alone(name, request):
    teacher = request.getfixturevalue(name)
    assert teacher.share_prompts
    draw = np.random.default_rng(4)
    prompt = draw.integers(0, 250, size=3 * WINDOW).tolist()
    rest = [draw.integers(0, 250, size=size).tolist() for size in (1, 4, 2 * WINDOW, 9)]
    sequences = [prompt + one for one in (*rest, rest[1])] + conversations(seed=5, count=1)[0]
    wanted = [range(len(prompt) - 1, len(one) - 1) for one in sequences[:-1]] + [range(3, 7)]
    together = teacher.score(sequences, wanted, 4)
    rows = plan(sequences, wanted, share=True)
    assert len(rows) == 2
    assert rows[0].tree
    for tokens, at, scores in zip(sequences, wanted, together, strict=True):
        same(scores, teacher.score([tokens], [at], 4)[0])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_hold_every_sequence_once_and_every_read_in_its_place(data):
    size = st.integers(2, 12)
    sequences = data.draw(
        st.lists(
            size.flatmap(lambda n: st.lists(st.integers(0, 1), min_size=n, max_size=n)),
            min_size=1,
            max_size=6,
        )
    )
    wanted = [sorted(data.draw(st.sets(st.integers(0, len(one) - 2)))) for one in sequences]
    rows = plan(sequences, wanted, share=data.draw(st.booleans()))
    seen = {}
    for batch in batches(rows, data.draw(st.integers(1, 60))):
        for place, row in enumerate(batch.rows):
            for number, at in row.reads:
                assert number not in seen
                seen[number] = at
                for stored, here in zip(wanted[number], at, strict=True):
                    # What this place sees is the sequence up to the wanted position, in order.
                    branch = int(batch.branch[place, here])
                    visible = [j for j in range(here + 1) if int(batch.branch[place, j]) in (0, branch)]
                    assert batch.tokens[place, visible].tolist() == sequences[number][: stored + 1]
                    assert batch.positions[place, visible].tolist() == list(range(stored + 1))
    assert sorted(seen) == [number for number, at in enumerate(wanted) if at]


def test_results_do_not_depend_on_chunks_batches_or_neighbours(llama, monkeypatch):
    sequences, wanted = conversations(count=4)
    tail = TailDraws(5, [2**100 + number for number in range(4)])
    whole = llama.score(sequences, wanted, 6, tail=tail)
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": 3 * llama.vocab_size})
    narrow = LocalTeacher.__new__(TransformersTeacher)
    LocalTeacher.__init__(narrow, llama.model, digest="", tokenizer_sha256=None, batch_tokens=16)
    order = [2, 0, 3, 1]
    pieces = narrow.score(
        [sequences[i] for i in order],
        [wanted[i] for i in order],
        6,
        tail=TailDraws(5, [tail.keys[i] for i in order]),
    )
    for place, number in enumerate(order):
        same(pieces[place], whole[number])
        assert np.array_equal(pieces[place].draws, whole[number].draws)


def test_the_same_call_gives_the_same_bits(student):
    sequences, wanted = conversations(count=3)
    tail = TailDraws(3, [1, 2, 3])
    once, again = (student.score(sequences, wanted, 5, tail=tail) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        for name in ("label_logprob", "ids", "logprobs", "tail_mass", "draws"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_tail_without_mass_gives_no_draws_and_k_of_the_vocabulary_leaves_none(llama):
    sequences, wanted = conversations(count=1)
    scores = llama.score(sequences, wanted, llama.vocab_size, tail=TailDraws(2, [0]))[0]
    assert (scores.tail_mass == 0).all()
    assert (scores.draws == -1).all()
    assert np.exp(scores.logprobs.astype(np.float64)).sum(axis=1) == pytest.approx(
        np.ones(len(scores)), abs=1e-5
    )


def test_mxfp4_weights_score_as_the_same_values_in_bf16(gpt_oss_dir, tmp_path):
    write_mxfp4(gpt_oss_dir, tmp_path / "packed", tmp_path / "twin")
    sequences, wanted = conversations(count=3)
    packed, twin = (open_teacher(tmp_path / name, dtype="bf16") for name in ("packed", "twin"))
    for one, other in zip(packed.score(sequences, wanted, 5), twin.score(sequences, wanted, 5), strict=True):
        assert np.array_equal(one.label_logprob, other.label_logprob)
        assert np.array_equal(one.ids, other.ids)
    assert packed.identity()["digest"] != twin.identity()["digest"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sequences": [[1, 999]], "wanted": [[0]]}, r"token id 999; the teacher has ids 0 to"),
        ({"sequences": [[1, -1]], "wanted": [[0]]}, r"token id -1"),
        ({"sequences": [[1]], "wanted": [[]]}, r"1 tokens: at least 2"),
        ({"sequences": [[1, 2, 3]], "wanted": [[0, 2]]}, r"from 0 at least to 1 at most"),
        ({"sequences": [[1, 2, 3]], "wanted": [[1, 0]]}, r"must rise"),
        ({"sequences": [[1] * 300], "wanted": [[0]]}, r"300 tokens; the teacher reads 256"),
        ({"wanted": []}, r"0 lists of positions for 1 sequences"),
        ({"topk": 10**6}, r"topk = 1000000: allowed are 0 to"),
        ({"topk": 0, "mass": 0.5}, r"mass = 0.5 with topk = 0"),
        ({"tail": TailDraws(4, [])}, r"4 draws with 0 keys"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, says, gpt_oss):
    asked = {"sequences": [[1, 2]], "wanted": [[0]], "topk": 2} | change
    with pytest.raises(TeacherError, match=says):
        gpt_oss.score(**asked)


def test_weights_that_give_no_numbers_are_refused(llama_dir):
    teacher = TransformersTeacher(llama_dir, digest="", device=CPU, dtype=torch.float32)
    teacher.model.module.lm_head.weight[5].fill_(float("nan"))
    with pytest.raises(TeacherError, match="not finite"):
        teacher.score([[1, 2, 3]], [[0, 1]], 2)


def test_a_directory_that_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(TeacherError, match=r"neither teacher.json nor config.json"):
        open_teacher(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="not a known checkpoint"):
        open_teacher(tmp_path)
