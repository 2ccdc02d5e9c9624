"""From logits to the next token: greedy, or sampled with temperature, top-k and top-p."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Filters apply in the customary order: temperature, then top-k, then top-p.

    Attributes:
        temperature: 0 takes the likeliest token; 1 samples the model's own distribution.
        top_k: Sample among this many likeliest tokens (and those that tie with the last); 0: all.
        top_p: Sample among the fewest likeliest tokens whose probabilities sum to at least this; 1: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: expected 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: expected 0 (all tokens) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p}: expected above 0, up to 1 (all tokens)")
        if self.greedy and (self.top_k or self.top_p < 1.0):
            raise ValueError(
                "top_k and top_p have no effect at temperature 0 (greedy); set temperature or leave them out"
            )

    @property
    def greedy(self) -> bool:
        """Whether chance plays no part."""
        return self.temperature == 0.0


GREEDY = Sampling()


class Chance:
    """The random numbers of one sequence: its n-th token depends on its seed and n, on nothing else.

    A counter-based generator (Philox) of its own per sequence, drawn on the CPU: neighbours in a batch, the
    batch's size and the device have no part in it.

    Args:
        seed: 0 to 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed = {seed}: expected 0 to 2^64 - 1")
        self._generator = np.random.Generator(np.random.Philox(key=seed))

    def draw(self) -> float:
        """Return the next number, uniform in [0, 1)."""
        return float(self._generator.random())

    def draws(self, count: int) -> NDArray[np.float64]:
        """Return the next `count` numbers, those that as many calls of `draw` would."""
        return self._generator.random(count)


def keep_likely(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits over the temperature, -inf for tokens that top-k or top-p exclude.

    Args:
        logits: fp32 `[B, V]`.
        sampling: Not greedy.

    Returns:
        fp32 `[B, V]`; every row keeps at least its likeliest token.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        last = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < last, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        excluded = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, float("-inf"))
    return logits


def pick(logits: torch.Tensor, sampling: Sampling, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next token of each row, without a word to the host.

    Sampling inverts the cumulative distribution in the order of token ids, in fp64, at the row's own random
    number.

    Args:
        logits: fp32 `[B, V]`.
        sampling: The rule.
        drawn: fp64 `[B]`, a number in [0, 1) of each row; not read when greedy.

    Returns:
        Tokens int64 `[B]`, and fp32 `[B]` the log-probability (natural logarithm) that the model itself gives
        each: at temperature 1 and with no token excluded. It is not finite where a row's logits are not.
    """
    if sampling.greedy:
        chosen = logits.argmax(dim=1)
    else:
        cumulative = keep_likely(logits, sampling).double().softmax(dim=1).cumsum(dim=1)
        # Below the total, which rounding may leave a little off 1: the token found has a probability.
        total = cumulative[:, -1]
        point = torch.minimum(drawn * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
        chosen = chosen.clamp(max=logits.shape[1] - 1)  # of a row of NaN, which whoever asks refuses
    return chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=1)


def choose(logits: torch.Tensor, sampling: Sampling, chances: list[Chance]) -> tuple[list[int], list[float]]:
    """Return the next token of each row as `pick` does; one number is drawn per token, whatever the filters.

    Args:
        logits: fp32 `[B, V]`.
        sampling: The rule.
        chances: One per row; not touched when greedy.

    Returns:
        Tokens and their log-probabilities.

    Raises:
        FloatingPointError: A row's logits are not finite.
    """
    draws = [] if sampling.greedy else [chance.draw() for chance in chances]
    chosen, logprobs = pick(logits, sampling, torch.tensor(draws, dtype=torch.float64, device=logits.device))
    found: list[float] = logprobs.tolist()
    if not np.isfinite(found).all():
        raise not_finite(int(np.flatnonzero(~np.isfinite(found))[0]))
    tokens: list[int] = chosen.tolist()
    return tokens, found


def not_finite(row: int) -> FloatingPointError:
    """Make the error of logits that no token can be chosen by."""
    return FloatingPointError(
        f"the logits of row {row} are not finite: the weights are damaged, or activations overflow in this "
        "dtype"
    )
