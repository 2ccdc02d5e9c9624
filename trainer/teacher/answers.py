"""What a completion endpoint is asked and answers, in the two forms that servers know.

`prompt_logprobs` (vLLM): for each token of the prompt an object from token id to `logprob` and `rank`, of the
K likeliest and the token itself. `echo` with `logprobs` (the older form of OpenAI's): three lists, tokens
written as `token_id:123`.
"""

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

from trainer.errors import TeacherError
from trainer.teacher.teacher import TeacherScores

_MOST_MASS = 1 + 1e-4
_TOKEN = "token_id:"


class Style(Enum):
    """The two forms."""

    PROMPT_LOGPROBS = "prompt_logprobs"
    ECHO = "echo"


class UnusableAnswerError(TeacherError):
    """An answer that another attempt may mend: cut off, or not in the form that was asked for.

    Attributes:
        other_style: The server does not know the form; it may know the other.
    """

    def __init__(self, message: str, *, other_style: bool = False) -> None:
        super().__init__(message)
        self.other_style = other_style


def body_of(model: str, prompts: Sequence[Sequence[int]], topk: int, style: Style) -> dict[str, Any]:
    """Return the body of a request.

    Args:
        model: Name on the server.
        prompts: Token ids of each prompt.
        topk: Likeliest tokens to list.
        style: Form of the answer.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": [list(map(int, prompt)) for prompt in prompts],
        "max_tokens": 1,  # servers insist on one; it is not read
        "temperature": 0.0,
        "n": 1,
        "stream": False,
        "add_special_tokens": False,
        "return_tokens_as_token_ids": True,
    }
    if style is Style.ECHO:
        return body | {"echo": True, "logprobs": topk}
    return body | {"prompt_logprobs": topk, "return_token_ids": True}


def parse(
    document: Any,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    topk: int,
    mass: float | None,
    style: Style,
) -> list[TeacherScores]:
    """Read an answer.

    Args:
        document: The answer's JSON.
        prompts: Token ids that were sent.
        wanted: Positions of each prompt that are read.
        topk: Likeliest tokens to list.
        mass: List as many of them as have this probability together.
        style: Form that was asked for.

    Raises:
        UnusableAnswerError: It is not whole, or not in this form.
        TeacherError: It speaks of other tokens than were sent, lists fewer than asked, or is no distribution.
    """
    try:
        choices = {int(choice["index"]): choice for choice in document["choices"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError(f"the answer has no choices ({type(error).__name__})") from error
    if sorted(choices) != list(range(len(prompts))):
        raise UnusableAnswerError(f"{len(choices)} choices for {len(prompts)} prompts")
    entries = _entries_of_prompt if style is Style.PROMPT_LOGPROBS else _entries_of_echo
    return [
        _scores(entries(choices[number], prompt), prompt, positions, topk, mass)
        for number, (prompt, positions) in enumerate(zip(prompts, wanted, strict=True))
    ]


Entry = tuple[float, list[tuple[int, float]]]
"""Log-probability of the token itself, and (id, log-probability) of those listed, likeliest first."""


def _entries_of_prompt(choice: Mapping[str, Any], prompt: Sequence[int]) -> list[Mapping[str, Any] | None]:
    found = choice.get("prompt_logprobs")
    if not isinstance(found, list):
        raise UnusableAnswerError("the answer has no prompt_logprobs", other_style=True)
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and list(echoed) != list(prompt):
        raise TeacherError(_others(prompt, echoed))
    if len(found) != len(prompt):
        raise TeacherError(f"the answer is about {len(found)} tokens, {len(prompt)} were sent")
    return found


def _entries_of_echo(choice: Mapping[str, Any], prompt: Sequence[int]) -> list[Mapping[str, Any] | None]:
    found = choice.get("logprobs")
    try:
        tokens, own, listed = (found[name] for name in ("tokens", "token_logprobs", "top_logprobs"))  # type: ignore[index]
    except (KeyError, TypeError) as error:
        raise UnusableAnswerError("the answer has neither prompt_logprobs nor echoed logprobs") from error
    if not all(isinstance(value, list) for value in (tokens, own, listed)) or min(
        map(len, (tokens, own, listed))
    ) < len(prompt):
        raise TeacherError(f"the answer echoes {len(tokens)} tokens, {len(prompt)} were sent")
    named = [str(token) for token in tokens[: len(prompt)]]
    if not all(name.startswith(_TOKEN) for name in named):
        raise TeacherError(
            "the answer echoes texts and no token ids, so nobody can tell whether they are those that were "
            "sent; serve with return_tokens_as_token_ids"
        )
    echoed = [int(name.removeprefix(_TOKEN)) for name in named]
    if echoed != list(prompt):
        raise TeacherError(_others(prompt, echoed))
    entries: list[Mapping[str, Any] | None] = []
    for token, logprob, others in zip(prompt, own, listed, strict=False):
        if logprob is None:
            entries.append(None)
            continue
        entry = {name.removeprefix(_TOKEN): {"logprob": value} for name, value in (others or {}).items()}
        entry.setdefault(str(token), {"logprob": logprob, "rank": len(entry) + 1})
        entries.append(entry)
    return entries


def _scores(
    entries: Sequence[Mapping[str, Any] | None],
    prompt: Sequence[int],
    wanted: Sequence[int],
    topk: int,
    mass: float | None,
) -> TeacherScores:
    n = len(wanted)
    scores = TeacherScores(
        np.empty(n, np.float32),
        np.full((n, topk), -1, np.int32),
        np.full((n, topk), -np.inf, np.float32),
        np.ones(n, np.float32),
        np.empty((n, 0), np.int32),
    )
    for row, at in enumerate(wanted):
        label, listed = _entry(entries[at + 1], prompt[at + 1], at + 1, topk)
        scores.label_logprob[row] = min(label, 0.0)
        total = 0.0
        for rank, (token, logprob) in enumerate(listed):
            if mass is not None and rank and total >= mass:
                break
            scores.ids[row, rank], scores.logprobs[row, rank] = token, min(logprob, 0.0)
            total += math.exp(logprob)
        if total > _MOST_MASS:
            raise TeacherError(
                f"the {len(listed)} likeliest tokens at position {at} have a probability of {total:.6f} "
                "together: the server gives no log-probabilities of its distribution; serve with logprobs of "
                "the raw distribution at temperature 1"
            )
        scores.tail_mass[row] = max(0.0, 1.0 - total)
    return scores


def _entry(entry: Mapping[str, Any] | None, token: int, place: int, topk: int) -> Entry:
    """Read what is said of one token of a prompt."""
    if not isinstance(entry, Mapping) or str(token) not in entry:
        found = "nothing" if not isinstance(entry, Mapping) else f"ids {', '.join(list(entry)[:4])}"
        raise TeacherError(
            f"token {place} was sent as id {token}, the answer speaks of {found}: the server reads other "
            "tokens "
            "than it was sent"
        )
    try:
        known = [
            (int(name), float(said["logprob"]), int(said.get("rank") or 0)) for name, said in entry.items()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError(
            f"what is said of token {place} is no log-probability ({error!r})"
        ) from error
    if not all(math.isfinite(logprob) for _, logprob, _ in known):
        raise TeacherError(
            f"a log-probability of token {place} is not finite: the served weights are damaged"
        )
    label = next(logprob for name, logprob, _ in known if name == token)
    # The token itself is listed whether or not it is among the likeliest: its rank says so, or its place.
    known.sort(key=lambda one: (-one[1], one[2], one[0]))
    listed = [(name, logprob) for name, logprob, _ in known[:topk]]
    if len(listed) < topk:
        raise TeacherError(
            f"{len(listed)} tokens are listed at token {place}, {topk} were asked for: start the server with "
            f"--max-logprobs {topk} or more, or lower topk"
        )
    return label, listed


def _others(sent: Sequence[int], echoed: Sequence[Any]) -> str:
    place = next(
        (at for at, (one, other) in enumerate(zip(sent, echoed, strict=False)) if one != other),
        min(len(sent), len(echoed)),
    )
    shown = [list(ids[place : place + 3]) for ids in (sent, echoed)]
    return (
        f"the ids that came back are not those that were sent: from token {place} on {shown[1]} for "
        f"{shown[0]}; "
        "the server adds or replaces tokens"
    )
