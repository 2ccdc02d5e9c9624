"""What a rollout is, and a round of them."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        epoch: Of the walk over the prompts.
        document: Number of the conversation, in the train split.
        sample: Which of the prompt's answers, from 0.
        mode: Reasoning mode that the prompt asks for.
        prompt: Token ids up to `<|start|>assistant` [P] int32.
    """

    epoch: int
    document: int
    sample: int
    mode: str
    prompt: NDArray[np.int32]


@dataclass(frozen=True)
class Score:
    """The teacher's judgement of the n sampled tokens of a rollout.

    Attributes:
        logprob: Log-probability of each [n] float32.
        ids: The K likeliest ids at each place, falling [n, K] int32; K is 0 where nobody asked.
        logprobs: Theirs [n, K] float32.
        tail: Probability of all others [n] float32.
    """

    logprob: NDArray[np.float32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]


@dataclass(frozen=True)
class Rollout:
    """A prompt and the student's answer.

    Attributes:
        request: What was asked for.
        number: Of its round.
        born: Step after which the weights stand that made it.
        ids: Sampled token ids [n] int32, a stop id among them where one ended the answer.
        behaviour: Log-probability of each under the student that sampled it, at temperature 1 [n] float32.
        stopped: A stop id ended it, and not the limit.
        score: Of the teacher; None while it is under way.
    """

    request: Request
    number: int
    born: int
    ids: NDArray[np.int32]
    behaviour: NDArray[np.float32]
    stopped: bool
    score: Score | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.prompt) + len(self.ids)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and answer [P + n] int32."""
        return np.concatenate((self.request.prompt, self.ids))

    def scored(self, score: Score) -> Self:
        """Return it with its judgement.

        Raises:
            ValueError: The judgement is not one of as many tokens.
        """
        n = len(self.ids)
        found = (score.logprob.shape, len(score.ids), len(score.logprobs), score.tail.shape)
        if found != ((n,), n, n, (n,)):
            raise ValueError(f"a rollout of {n} sampled tokens was given a score of shapes {found}")
        return replace(self, score=score)
