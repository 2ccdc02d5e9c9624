"""A teacher that contradicts itself or its replicas is refused, with the numbers."""

import numpy as np
import pytest

from tests.trainer.teacher.serving import DESCRIPTOR, Served, serving
from tests.trainer.teacher.test_local_teachers import conversations
from tests.trainer.teacher.test_server import QUICK
from trainer.checkpoints.tokenizers import RANKS_FINGERPRINT, RANKS_SHA256
from trainer.errors import TeacherError
from trainer.teacher.journal import JournalledTeacher
from trainer.teacher.self_test import NOISE, require_tokenizer, self_test
from trainer.teacher.server import ServerTeacher
from trainer.teacher.teacher import Teacher, TeacherScores
from trainer.teacher.transformers_teacher import tokenizer_digest

SEQUENCES, WANTED = conversations(count=5)


class Noisy(Teacher):
    """Says what it should, and some noise that may depend on the company or on the time."""

    kind = "noisy"

    def __init__(self, noise: float, by: str) -> None:
        self.noise, self.by, self.calls = noise, by, 0

    def identity(self):
        return {}

    def _score(self, sequences, wanted, topk, mass, tail):
        self.calls += 1
        made = []
        for place, (tokens, at) in enumerate(zip(sequences, wanted, strict=True)):
            truth = np.random.default_rng(sum(tokens)).normal(-2, 1, size=len(at))
            seed = self.calls if self.by == "time" else place if len(sequences) > 1 else 0
            noise = np.random.default_rng([seed, sum(tokens)]).normal(0, self.noise, size=len(at))
            scores = TeacherScores.of_nothing(topk, 0)
            made.append(
                TeacherScores(
                    (truth + noise).astype(np.float32),
                    scores.ids,
                    scores.logprobs,
                    scores.tail_mass,
                    scores.draws,
                )
            )
        return made


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "student"])
def test_a_teacher_with_weights_passes_far_inside_the_bound(name, request):
    found = self_test(request.getfixturevalue(name), SEQUENCES, WANTED)
    assert found.tokens == sum(map(len, WANTED))
    assert max(found.repeated, found.shuffled) < 1e-3 * NOISE * found.signal
    assert found.replicas == 0.0


@pytest.mark.parametrize(("by", "how"), [("time", "one by one"), ("company", "one by one")])
def test_noise_beyond_the_bound_is_refused_and_less_passes(by, how):
    # Two draws of noise differ by √2 of one.
    found = self_test(Noisy(0.6 * NOISE / 2**0.5, by), SEQUENCES, WANTED)
    assert 0 < found.repeated < NOISE * found.signal
    with pytest.raises(TeacherError, match=rf"noisy answered, and asked again {how}, answered.*at most 5%"):
        self_test(Noisy(2 * NOISE, by), SEQUENCES, WANTED)


def test_replicas_of_other_weights_are_refused_and_both_are_named(llama, tmp_path):
    with serving(Served(llama.model.module)) as one, serving(Served(llama.model.module, shift=0.6)) as other:
        with (
            ServerTeacher(DESCRIPTOR, [one.url, other.url], manners=QUICK) as teacher,
            pytest.raises(TeacherError, match=rf"replicas {one.url} and {other.url} answered.* nats.*spread"),
        ):
            self_test(teacher, SEQUENCES, WANTED)
        other.shift = 0.0
        served = ServerTeacher(DESCRIPTOR, [one.url, other.url], manners=QUICK)
        with JournalledTeacher(served, tmp_path / "answers") as teacher:
            found = self_test(teacher, SEQUENCES, WANTED)
            assert found.replicas < 1e-4
            assert (tmp_path / "answers").stat().st_size == 0  # a test is no answer to keep


def test_too_few_tokens_to_tell_are_refused():
    with pytest.raises(TeacherError, match="needs 16 tokens at least, found 2"):
        self_test(Noisy(0, "time"), [[1, 2, 3]], [[0, 1]])


def test_o200k_is_known_in_any_format(o200k, llama):
    assert tokenizer_digest(o200k) == RANKS_SHA256
    assert tokenizer_digest(llama.model.tokenizer) == llama.model.tokenizer.fingerprint != RANKS_FINGERPRINT


def test_a_teacher_of_other_token_ids_is_refused(llama, student):
    require_tokenizer(student, "any", student.vocab_size)
    require_tokenizer(llama, llama.tokenizer_sha256, llama.vocab_size)
    with pytest.raises(TeacherError, match=r"the teacher's tokenizer is [0-9a-f]{64}, the data's is 446a"):
        require_tokenizer(llama, "446a", 1)
    for other in (201087, 201089):
        with pytest.raises(TeacherError, match=rf"has 201088 token ids, the data have {other}"):
            require_tokenizer(student, "any", other)
