"""Before a shard counts: does the teacher still say what stands in it?

The self-test comes before the first question. A server that is started anew meanwhile, with other weights or
in another type, would fail no test, and what it said before or since would stand in the store for good.
"""

from pathlib import Path

import numpy as np

from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.shard_reader import TopKShard
from trainer.errors import TeacherError
from trainer.teacher.scope import Conversation, Place, Scope
from trainer.teacher.self_test import Logprobs, require_same, rms
from trainer.teacher.shards import Terms, questions, shard_path
from trainer.teacher.teacher import Teacher

ASKED = 8
"""Conversations of a shard that are asked about again, spread over it evenly."""


def ask_again(
    root: Path, scope: Scope, place: Place, teacher: Teacher, terms: Terms, count: int, signal: float
) -> None:
    """Ask about some conversations of a shard again; one that says something else is removed.

    Args:
        root: Where shards are made.
        scope: The data set.
        place: The shard, closed.
        teacher: Who is asked.
        terms: How.
        count: Conversations that the shard has.
        signal: Spread of the teacher's log-probabilities, nats; see `self_test`.

    Raises:
        TeacherError: The teacher contradicts what is stored by more than noise, and what storing adds to it.
    """
    chosen = _spread(scope, place, count)
    sequences, wanted = questions(chosen, terms)
    if not sum(map(len, wanted)):
        return  # nothing in it is supervised
    # The same question: a server need not say the same of a token beside other alternatives.
    answers = teacher.score(sequences, wanted, terms.identity.topk, mass=terms.identity.mass)
    said = np.concatenate([one.label_logprob for one in answers])
    apart = rms(said.astype(np.float64) - _stored(root, place, terms.identity, chosen))
    try:
        require_same(
            max(0.0, apart - terms.identity.logprob_error),
            signal,
            f"{place}: the teacher answered, and now answers",
        )
    except TeacherError as error:
        shard_path(root, place).unlink()
        raise TeacherError(f"{error}. The shard is removed: start again, and it is scored anew") from error


def _spread(scope: Scope, place: Place, count: int) -> list[Conversation]:
    numbers = {round(number) for number in np.linspace(0, count - 1, min(ASKED, count))}
    return [one for number, one in enumerate(scope.conversations(place)) if number in numbers]


def _stored(root: Path, place: Place, identity: StoreIdentity, chosen: list[Conversation]) -> Logprobs:
    shard = TopKShard(shard_path(root, place), identity, split=place.split, shard=place.shard)
    found = []
    for one in chosen:
        block = shard.block_of(one.sequence)
        sequences, records = shard.read_block(block)
        found.append(records[shard.rows(sequences, one.sequence, block)].label_logprob)
    return np.concatenate(found).astype(np.float64)
