"""What was answered once is answered the same after a restart, whatever a crash left of the last line."""

import shutil

import numpy as np
import pytest

from tests.trainer.teacher.test_local_teachers import conversations
from trainer.errors import TeacherError
from trainer.teacher.journal import JournalledTeacher
from trainer.teacher.teacher import TailDraws, Teacher

FIELDS = ("label_logprob", "ids", "logprobs", "tail_mass", "draws")
SEQUENCES, WANTED = conversations(count=4)


class Fickle(Teacher):
    """Never says the same twice, and counts what it is asked."""

    kind = "fickle"

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.asked = teacher, 0
        self.vocab_size, self.context = teacher.vocab_size, teacher.context

    def identity(self):
        return {"kind": self.kind}

    def _score(self, sequences, wanted, topk, mass, tail):
        self.asked += len(sequences)
        found = self.teacher.score(sequences, wanted, topk, mass=mass, tail=tail)
        for one in found:
            one.label_logprob[:] -= np.float32(self.asked)
        return found


def equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        for name in FIELDS:
            assert np.array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_answers_are_replayed_and_only_news_is_asked(llama, tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    tail = TailDraws(2, [1, 2])
    with JournalledTeacher(Fickle(llama), path) as teacher:
        first = teacher.score(SEQUENCES[:2], WANTED[:2], 3, mass=0.7, tail=tail)
        assert teacher.teacher.asked == 2
    with JournalledTeacher(Fickle(llama), path) as teacher:
        again = teacher.score(
            SEQUENCES[:3][::-1], WANTED[:3][::-1], 3, mass=0.7, tail=TailDraws(2, [3, 2, 1])
        )
        equal(again[1:][::-1], first)
        assert (teacher.teacher.asked, teacher.replayed) == (1, 2)
        for change in ({"topk": 2}, {"mass": 0.6}, {"tail": None}, {"tail": TailDraws(2, [9, 9])}):
            before = teacher.teacher.asked
            asked = {"topk": 3, "mass": 0.7, "tail": tail} | change
            teacher.score(SEQUENCES[:2], WANTED[:2], **asked)
            assert teacher.teacher.asked == before + 2
        twice = teacher.score([SEQUENCES[3]] * 2, [WANTED[3]] * 2, 0)
        equal(twice[:1], twice[1:])


def test_a_line_that_a_crash_cut_short_is_asked_again_at_every_length(llama, tmp_path):
    whole = tmp_path / "whole"
    with JournalledTeacher(Fickle(llama), whole) as teacher:
        first = teacher.score(SEQUENCES[:2], WANTED[:2], 2)
    content = whole.read_bytes()
    begin = content.index(b"\n") + 1
    for end in (begin, begin + 1, begin + 70, len(content) - 2, len(content) - 1):
        path = tmp_path / "torn"
        path.write_bytes(content[:end])
        with JournalledTeacher(Fickle(llama), path) as teacher:
            assert path.stat().st_size == begin
            equal(teacher.score(SEQUENCES[:1], WANTED[:1], 2), first[:1])
            assert teacher.teacher.asked == 0
            other = teacher.score(SEQUENCES[1:2], WANTED[1:2], 2)
            assert teacher.teacher.asked == 1
        with JournalledTeacher(Fickle(llama), path) as teacher:
            equal(teacher.score(SEQUENCES[1:2], WANTED[1:2], 2), other)


@pytest.mark.parametrize("place", [20, 200, 400])
def test_damage_is_refused_with_its_line(place, llama, tmp_path):
    path = tmp_path / "answers"
    with JournalledTeacher(Fickle(llama), path) as teacher:
        teacher.score(SEQUENCES[:2], WANTED[:2], 2)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    if content[20:21] == path.read_bytes()[20:21] and place == 20:
        # The key itself: the answer is whole, and belongs to a question that nobody asks.
        with JournalledTeacher(Fickle(llama), path) as teacher:
            teacher.score(SEQUENCES[:2], WANTED[:2], 2)
            assert teacher.teacher.asked == 1
        return
    with pytest.raises(TeacherError, match=r"line 1 is damaged"):
        JournalledTeacher(Fickle(llama), path)
    shutil.copy(path, tmp_path / "kept")  # it is left as it was
    assert path.read_bytes() == bytes(content)
