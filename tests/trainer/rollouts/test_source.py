"""Rollouts of a real tiny student: the clock alone decides what a step sees."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from tests.trainer.rollouts.cases import EOD, STOP, VOCAB, FormulaTeacher, TinyForm, tiny_prompts
from tests.trainer.train.train_jobs import tiny_recipe
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse
from trainer.contract.schema.distillation import Rollouts
from trainer.decoding.generation import evaluating
from trainer.errors import DataError, TeacherError
from trainer.job.distributed import session
from trainer.model.gpt import build_model
from trainer.rollouts.history import History
from trainer.rollouts.scoring import Scorer
from trainer.rollouts.source import BUFFER_NAME, RolloutSource
from trainer.rollouts.storage import read_round, round_name

STEPS, SEQ_LEN, ROWS = 4, 24, 2


@pytest.fixture(scope="module")
def layout():
    with session("cpu") as found:
        yield found


@pytest.fixture(scope="module")
def student(layout):
    architecture = tiny_recipe()["architecture"]
    return build_model(parse(Architecture, architecture), dtype=torch.float32, device="cpu", seed=3)


def asked(**changes):
    phase = {"until": 1.0, "medium": 0.5, "high": 0.5, "rollouts": 2}
    keys = {"anchor_fraction": 0.25, "max_new_tokens": 8, "buffer_size": 8, "curriculum": [phase]}
    return parse(Rollouts, keys | {"delay": 1, "max_staleness": 2} | changes)


def source(layout, teacher, *, recipe=None, directory=None, asynchronous=True):
    recipe = recipe or asked()
    scorer = Scorer(
        teacher,
        topk=recipe.baseline_topk if recipe.baseline else 0,
        device=torch.device("cpu"),
        threads=torch.get_num_threads(),
        asynchronous=asynchronous,
    )
    return RolloutSource(
        recipe,
        prompts=tiny_prompts(),
        scorer=scorer,
        form=TinyForm(),
        history=History(directory),
        layout=layout,
        seed=11,
        steps=STEPS,
        seq_len=SEQ_LEN,
        eod=EOD,
    )


def weights_after(student, step):
    """Stands for training: other weights after every step."""
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def kept(source, directory):
    """What a checkpoint holds of a source: its state, and the directory of its buffer."""
    directory.mkdir()
    source.save(directory)
    return source.state_dict(), directory


def resumed(source, state, directory):
    source.load_state_dict(state)
    source.load(directory)
    return source


def run(student, source, first=1, last=STEPS, saved=None, tmp=None):
    """All rows of all steps, as bytes; the state after each step goes into `saved`."""
    found = []
    for step in range(first, last + 1):
        weights_after(student, step - 1)
        source.prepare(step, student)
        rows = [source.sample(*place) for place in source.take(ROWS)]
        found.append([{name: value.numpy().tobytes() for name, value in row.items()} for row in rows])
        if saved is not None:
            saved[step] = kept(source, tmp / str(step))
    source.close()
    return found


@pytest.fixture(scope="module")
def straight(layout, student, tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    saved = {}
    made = source(layout, FormulaTeacher(), directory=directory)
    rows = run(student, made, saved=saved, tmp=tmp_path_factory.mktemp("saved"))
    return rows, saved, directory


@pytest.mark.parametrize(
    "changes", [{}, {"delay": 0, "max_staleness": 0, "baseline": True, "baseline_topk": 3}]
)
def test_a_teacher_beside_the_student_or_waited_for_gives_the_same_bits(layout, student, changes):
    recipe = asked(**changes)
    beside, waited = (
        run(student, source(layout, FormulaTeacher(), recipe=recipe, asynchronous=flag))
        for flag in (True, False)
    )
    assert beside == waited


def test_a_run_goes_on_from_every_step_bit_for_bit_and_its_history_is_the_same(
    layout, student, straight, tmp_path
):
    rows, saved, directory = straight
    history = {path.name: path.read_bytes() for path in directory.iterdir()}
    for step in range(1, STEPS):
        own = tmp_path / f"from {step}"
        own.mkdir()
        for later in directory.iterdir():
            (own / later.name).write_bytes(b"of steps that were run and lost")
        for number in range(1, step + 1):
            (own / round_name(number)).write_bytes(history[round_name(number)])
        again = resumed(source(layout, FormulaTeacher(), directory=own), *saved[step])
        assert run(student, again, step + 1) == rows[step:]
        assert again.state_dict() == saved[STEPS][0]
        assert {path.name: path.read_bytes() for path in own.iterdir()} == history


def test_a_save_brings_scores_along_that_are_there_and_asks_again_for_those_that_are_not(
    layout, student, tmp_path
):
    quick, gate = FormulaTeacher(), threading.Event()
    ready = source(layout, quick, asynchronous=False)
    late = source(layout, FormulaTeacher(gate=gate, hold_after=4))  # round 1, and no answer to round 2
    for one in (ready, late):
        weights_after(student, 0)
        one.prepare(1, student)
        one.take(ROWS)
    saved = [kept(one, tmp_path / name) for one, name in ((ready, "ready"), (late, "late"))]
    sizes = [(directory / BUFFER_NAME).stat().st_size for _, directory in saved]
    assert sizes[0] > sizes[1], "scores of the round under way"
    assert saved[0][0] == saved[1][0], "the place in the run does not know how fast the teacher is"
    gate.set()
    ends = []
    for place, wanted in zip(saved, (False, True), strict=True):
        teacher = FormulaTeacher()
        again = resumed(source(layout, teacher), *place)
        ends.append(run(student, again, 2))
        second = quick.asked[4:8]
        assert (second[0] in teacher.asked) is wanted
    assert ends[0] == ends[1]
    for one in (ready, late):
        one.close()


def test_answers_are_the_students_own_and_every_prompt_of_the_walk_stands_once_in_the_history(
    layout, student, straight
):
    from trainer.decoding.cache import DecodingCache, extend

    _, _, directory = straight
    paths = sorted(directory.iterdir())
    asked_for = []
    for number, path in enumerate(paths, 1):
        header, arrays = read_round(path.read_bytes())
        assert (header["round"], header["born"]) == (number, max(0, number - 2))
        weights_after(student, header["born"])
        ends = np.cumsum(arrays["lengths"]).tolist()
        for place, end in enumerate(ends):
            ids = arrays["ids"][end - arrays["lengths"][place] : end].tolist()
            mode = header["modes"][arrays["modes"][place]]
            prompt = tiny_prompts().prompt(int(arrays["documents"][place]), mode).tolist()
            tokens = torch.tensor([[*prompt, *ids]])
            with evaluating(student):
                hidden = extend(student, DecodingCache(1), tokens)
                logits = torch.nn.functional.linear(hidden[:, 0], student.head_weight).double()
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None])
            found = arrays["behaviour_logprob"][end - len(ids) : end]
            np.testing.assert_allclose(found, expected[:, 0].numpy(), atol=2e-5)
            assert bool(arrays["stopped"][place]) == (ids[-1] == STOP)
            assert len(ids) == 8 or ids[-1] == STOP
        asked_for += list(
            zip(*(arrays[name].tolist() for name in ("epochs", "documents", "samples")), strict=True)
        )
    assert len(asked_for) == len(set(asked_for)) == STEPS * 4
    assert set(Counter((epoch, document) for epoch, document, _ in asked_for).values()) == {2}


def test_what_a_step_logs_adds_up(layout, student):
    recipe = asked(baseline=True, baseline_topk=VOCAB)
    found = source(layout, FormulaTeacher(), recipe=recipe)
    trained = dropped = 0
    for step in range(1, STEPS + 1):
        weights_after(student, step - 1)
        found.prepare(step, student)
        found.take(ROWS)
        logged = found.metrics()
        trained += logged["rollouts/trained"]
        dropped += logged["rollouts/dropped"]
        assert sum(logged[f"rollouts/staleness/{age}"] for age in range(3)) == logged["rollouts/trained"]
        assert sum(logged[f"rollouts/mode/{mode}"] for mode in ("low", "medium", "high")) == 4
        assert trained + dropped + logged["rollouts/waiting"] == 4 * step
        assert logged["rollouts/under_way"] == (4 if step < STEPS else 0)
        assert 0 < logged["rollouts/fill"] <= 1
        assert logged["rollouts/entropy"] > 0
        assert 1 <= logged["rollouts/length"] <= 8
        assert logged["rollouts/in_teacher_topk"] == 1.0, "K is the whole vocabulary"
        assert logged["rollouts/dropped_total"] == dropped
        assert "round" in found.describe(step, 0)
        with pytest.raises(IndexError, match=f"the present one is {step}"):
            found.sample(step - 1, 0)
    found.close()


def test_an_error_of_the_teacher_ends_the_run_and_leaves_no_half_round(layout, student, tmp_path):
    found = source(layout, FormulaTeacher(fail_after=8), directory=tmp_path)
    with pytest.raises(TeacherError, match="the teacher has gone home; start it again"):
        run(student, found)
    found.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [round_name(number) for number in (1, 2)]


def test_a_buffer_of_another_moment_is_refused(layout, student, straight):
    _, saved, _ = straight
    again = source(layout, FormulaTeacher())
    with pytest.raises(DataError, match="of another moment"):
        resumed(again, saved[1][0], saved[2][1])
    wrong = source(layout, FormulaTeacher(), recipe=asked(delay=2))
    with pytest.raises(DataError, match=r"has rounds \[2\] under way, expected \[2, 3\]"):
        resumed(wrong, *saved[1])
    wrong.close()
    again.close()
