"""On-policy distillation: a policy gradient towards the teacher, on what the student wrote itself.

For a token v that the student sampled, with the teacher's and the student's present log-probabilities of it::

    a_t = stopgrad(lp_T - lp_S)                     clipped to |a_t| <= advantage_clip where that is given
    L   = w_r mean_r(-a_t lp_S) + w_f mean_f(-a_t lp_S)

whose gradient is a one-sample estimate of that of the reverse KL(student || teacher) at each position. With
`rollouts.baseline` the advantage is `a_t - b_t`, b_t being its expectation under the student in closed form
over the teacher's likeliest ids K, all others as one::

    b_t = stopgrad(sum_K p (lp_T - lp_S) + p_* (log q_* - log p_*))

clipped like the advantage. It does not depend on which token was sampled, so it takes variance away and adds
no bias, as long as tokens are sampled from the student's own distribution: with a baseline another
temperature is refused. Without one it is allowed: each token still pulls as the teacher says, but how often
it is visited is the other distribution's matter, and the sum is no longer the gradient of that divergence.
Control tokens of the format that the batch marks as `excluded` are neither trained on nor counted. The
conversations of the mixture are the anchor: plain cross-entropy.

Of rollouts a batch has, label-aligned, `teacher_label_logprob` and `behaviour_logprob` `[B, S]` (the
student's own when it sampled), `excluded` `[B, S]` bool, and for the baseline `teacher_ids` and
`teacher_logprobs` `[B, S, K]` and `teacher_tail` `[B, S]`.

Logged of rollout spans s: `loss/s`, the mean of `-a_t lp_S`, which is no distance and need not fall;
`logprob_gap/s`, the mean of `lp_T - lp_S`, unclipped: minus the reverse KL, estimated; `clipped/s`, the share
of clipped advantages; `behaviour_drift/s`, the mean of `lp_S` less what it was when the token was sampled;
`advantage_square/s`, the mean square of what multiplies the gradient; and with a baseline `baseline/s`, its
mean, and `student_mass/s`, what the student gives the teacher's likeliest ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.contract.kinds import ROLLOUTS
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.distillation import Rollouts
from trainer.contract.schema.training import TrainRecipe
from trainer.losses.common.measures import MeasuredBatch, SpanMeasures
from trainer.losses.common.mixture import Mixture
from trainer.losses.common.objective import Head, Objective
from trainer.losses.common.parts import mixture_of
from trainer.losses.common.scored import LABEL, LEAST_MASS, require_fields, spans_of, tokens_of
from trainer.losses.common.spans import Batch, SpanMetrics, span_counts, token_weights

_BEHAVIOUR = "behaviour_logprob"
_MEASURES = ("logprob_gap", "clipped", "behaviour_drift", "advantage_square")
_OF_BASELINE = ("baseline", "student_mass")


class OnPolicyDistillation(Objective):
    """Policy gradient of the reverse KL on rollouts, cross-entropy on the anchor.

    Args:
        mixture: The kinds, with the weights of their spans.
        rollouts: Clip and baseline.
    """

    def __init__(self, mixture: Mixture, rollouts: Rollouts) -> None:
        self.mixture, self.rollouts = mixture, rollouts
        self.written = spans_of(mixture, ROLLOUTS)
        self.measured = SpanMetrics(mixture.spans)
        names = (*_MEASURES, *_OF_BASELINE) if rollouts.baseline else _MEASURES
        self.measures = SpanMeasures(self.written, names)
        self.absent = self.measured.absent

    @classmethod
    def refuse(cls, recipe: TrainRecipe) -> None:
        """Refuse a recipe without rollouts, or with a baseline that would be biased."""
        rollouts = recipe.rollouts
        if rollouts is None:
            raise ConfigError(
                "recipe.rollouts: missing, and recipe.objective = 'opd' learns from them; add the table, or "
                "take objective = 'span_ce'"
            )
        if rollouts.baseline and rollouts.temperature != 1:
            raise ConfigError(
                f"recipe.rollouts.baseline = true with recipe.rollouts.temperature = {rollouts.temperature}: "
                "tokens sampled from another distribution than the student's make it biased; set temperature "
                "= 1.0 or baseline = false"
            )

    @classmethod
    def of(cls, recipe: TrainRecipe, kinds: Iterable[str]) -> Self:
        """Make the objective of a recipe."""
        assert recipe.rollouts is not None  # refuse
        return cls(mixture_of(kinds, recipe.kd), recipe.rollouts)

    def start(
        self, batches: Sequence[Batch], samples: Mapping[str, int], group: dist.ProcessGroup | None
    ) -> "GlobalBatch":
        """Count the tokens of each span and give the spans their weights in this batch."""
        fields: dict[str, int | None] = dict.fromkeys((LABEL, _BEHAVIOUR, "excluded"))
        if self.rollouts.baseline:
            topk = self.rollouts.baseline_topk
            fields |= {"teacher_ids": topk, "teacher_logprobs": topk, "teacher_tail": None}
        require_fields(batches, self.written, fields, "the source of rollouts")
        counts = span_counts([_trained(batch) for batch in batches], self.mixture.spans, group)
        return GlobalBatch(self, counts, self.mixture.of_batch(counts, samples), group)


def _trained(batch: Batch) -> Batch:
    """Return the batch with excluded tokens unsupervised."""
    if "excluded" not in batch:
        return batch
    kept = torch.where(batch["excluded"], 0.0, batch["loss_mask"])
    return {**batch, "loss_mask": kept.to(batch["loss_mask"].dtype)}


class TokenRule:
    """The loss of the tokens of one micro-batch, as `head.support_loss` asks for it.

    Args:
        batch: With the fields of rollouts, `[B, S, ...]`, excluded tokens unsupervised.
        written: `[B, S]`, tokens that the student sampled; the other supervised ones have cross-entropy.
        weights: `[B, S]`, weight of each token in the sum.
        clip: Bound of the absolute advantage, or None.
        baseline: Whether to subtract the closed form.

    Attributes:
        support: int64 `[B, S, n]`.
        found: Values of tokens by name, float64 `[B * S]`, filled as the rule is asked.
    """

    def __init__(
        self, batch: Batch, written: Tensor, weights: Tensor, clip: float | None, baseline: bool
    ) -> None:
        parts = [batch["labels"].unsqueeze(-1)]
        self._written, self._weights = written.reshape(-1), weights.reshape(-1)
        self._teacher = torch.where(written, batch[LABEL], 0.0).reshape(-1)
        self._behaviour = torch.where(written, batch[_BEHAVIOUR], 0.0).reshape(-1)
        self._clip, self._baseline = clip, baseline
        if baseline:
            ids = batch["teacher_ids"]
            parts.append(ids)
            self._ids = ids.reshape(-1, ids.shape[-1])
            self._logprobs = batch["teacher_logprobs"].reshape(-1, ids.shape[-1])
            self._tail = torch.where(written, batch["teacher_tail"], 0.0).reshape(-1)
        self.support = torch.cat(parts, dim=-1)
        names = ("losses", *_MEASURES, *(_OF_BASELINE if baseline else ()))
        self.found = {
            name: torch.zeros(written.numel(), dtype=torch.float64, device=written.device) for name in names
        }

    def __call__(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted losses [c] of a chunk of tokens."""
        wide, written = logprobs.dtype, self._written[rows]
        own = logprobs[:, 0]
        gap = torch.where(written, self._teacher[rows].to(wide) - own.detach(), 0.0)
        advantage = self._clipped(gap)
        values = {
            "logprob_gap": gap,
            "clipped": advantage != gap,
            "behaviour_drift": torch.where(written, own.detach() - self._behaviour[rows].to(wide), 0.0),
        }
        if self._baseline:
            expected, mass = self._expected(logprobs[:, 1:].detach(), rows)
            advantage = advantage - expected
            values |= {"baseline": expected, "student_mass": mass}
        losses = torch.where(written, -advantage * own, -own)
        values |= {"advantage_square": advantage.square(), "losses": losses.detach()}
        for name, value in values.items():
            self.found[name][rows] = value.double()
        return self._weights[rows].to(wide) * losses

    def _clipped(self, advantage: Tensor) -> Tensor:
        return advantage if self._clip is None else advantage.clamp(-self._clip, self._clip)

    def _expected(self, logprobs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the advantage's expectation under the student [c], and the student's mass on K [c]."""
        wide = logprobs.dtype
        present = (self._ids[rows] >= 0) & self._written[rows].unsqueeze(1)
        teacher = torch.where(present, self._logprobs[rows].to(wide), 0.0)
        student = torch.where(present, logprobs, 0.0)
        p = torch.where(present, student.exp(), 0.0)
        mass = p.sum(dim=1)
        rest = (1 - mass).clamp(min=LEAST_MASS)
        tail = self._tail[rows].to(wide).clamp(min=LEAST_MASS)
        expected = (p * (teacher - student)).sum(dim=1) + rest * (tail.log() - rest.log())
        return torch.where(self._written[rows], self._clipped(expected), 0.0), mass


class GlobalBatch(MeasuredBatch[OnPolicyDistillation]):
    """One global batch of rollouts and their anchor."""

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum of the micro-batch's token losses, each by the weight of its span over the span's tokens."""
        batch = _trained(batch)
        weights = token_weights(batch, self.counts, self.weighted)
        select = batch["loss_mask"] > 0
        if LABEL not in batch:  # conversations alone
            loss, ce = head.cross_entropy(hidden, batch["labels"], weights, select)
            self.measured.add(batch, ce)
            return loss
        written = tokens_of(batch, self.objective.written)
        asked = self.objective.rollouts
        rule = TokenRule(batch, written, weights, asked.advantage_clip, asked.baseline)
        loss, _ = head.support_loss(hidden, rule.support, rule, select)
        self.measured.add(batch, rule.found["losses"])
        self.measures.add(batch, rule.found)
        return loss


OBJECTIVE = OnPolicyDistillation
