"""Divergence of the student from a teacher's stored distributions, beside the cross-entropy.

Over each span s of the scored conversations, with a the recipe's `kd.kl_weight`::

    L_s = a * mean_s(kl_t) + (1 - a) * mean_s(w_t ce_t)

w is 1, or the weights of `common.scored.Rescoring`. Other conversations of the mixture have plain
cross-entropy. The store keeps of the teacher q at a token the likeliest ids K with their probabilities, the
mass q_* of all others, and M ids drawn from those by their probabilities. With the student p and
`p_* = max(1 - sum_K p, 1e-8)` the targets of `kd.target` are::

    bucket      sum_K q_k (log q_k - log p_k)  +  q_* (log max(q_*, 1e-8) - log p_*)
    unbiased    sum_K q_k (log q_k - log p_k)  +  q_* log max(q_*, 1e-8)  -  q_* / M * sum_m log p_(d_m)
    mix         half of each

The bucket is a divergence of its own, between distributions that see all other ids as one: at most the whole
KL(q || p), which it is where K is the vocabulary. Its gradient is biased and has next to no noise. The
unbiased target has in expectation the gradient of the whole KL; its value is above that by q_* times the
entropy of the teacher within its tail, which no record holds, so values of different targets cannot be laid
over each other. What is logged as `kl` is the bucket's under every target. Temperature is 1: the
log-probabilities of K ids cannot be brought to another without the normaliser. No tail is ever dropped and
nothing is renormalised: either teaches a wrong distribution.

Logged of scored spans s beside the loss: `ce/s`, the cross-entropy; `kl/s`, the bucket's divergence;
`teacher_mass/s`, what the kept ids hold of the teacher's distribution; `top1_agreement/s`, the share of
tokens where both have the same likeliest id; and `rescoring/s`, the mean of w, where there are weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.contract.kinds import SCORED
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.distillation import KDConfig, ScoredData, Target
from trainer.contract.schema.training import TrainRecipe
from trainer.errors import LossError
from trainer.losses.common.measures import MeasuredBatch, SpanMeasures
from trainer.losses.common.objective import Head, Objective
from trainer.losses.common.parts import mixture_of
from trainer.losses.common.scored import (
    LABEL,
    LEAST_MASS,
    Rescoring,
    require_fields,
    require_scored,
    spans_of,
    tokens_of,
)
from trainer.losses.common.spans import Batch, SpanMetrics, span_counts, token_weights

_MEASURES = ("ce", "kl", "teacher_mass", "top1_agreement")


class TopKDivergence(Objective):
    """Top-K divergence and cross-entropy on scored conversations, cross-entropy on the others.

    Args:
        kinds: Kinds of samples that the run mixes.
        kd: Weights and target.
        store: What the store keeps of a token.
    """

    def __init__(self, kinds: Iterable[str], kd: KDConfig, store: ScoredData) -> None:
        assert kd.kl_weight is not None  # refuse
        assert kd.target is not None
        self.kl_weight, self.target, self.store = kd.kl_weight, kd.target, store
        self.mixture = mixture_of(kinds, kd)
        self.scored = spans_of(self.mixture, SCORED)
        self.rescoring = None if kd.rescored is None else Rescoring(kd.rescored, self.scored)
        self.measured = SpanMetrics(self.mixture.spans)
        names = _MEASURES if self.rescoring is None else (*_MEASURES, "rescoring")
        self.measures = SpanMeasures(self.scored, names)
        self.absent = self.measured.absent

    @classmethod
    def refuse(cls, recipe: TrainRecipe) -> None:
        """Refuse a recipe without scores or without a target, or with weights that nothing would use."""
        require_scored(recipe)
        kd = recipe.kd
        for key, example in (("kl_weight", "0.5"), ("target", "'bucket'")):
            if getattr(kd, key, None) is None:
                raise ConfigError(
                    f"recipe.kd.{key}: missing, and recipe.objective = 'topk_kl' needs it; {key} = {example} "
                    "is a good start"
                )
        if kd is not None and kd.kl_weight == 1 and kd.rescored is not None:
            raise ConfigError(
                "recipe.kd.rescored weighs the cross-entropy of scored tokens, and recipe.kd.kl_weight = 1.0 "
                "leaves it out; lower kl_weight, or leave rescored out"
            )

    @classmethod
    def of(cls, recipe: TrainRecipe, kinds: Iterable[str]) -> Self:
        """Make the objective of a recipe."""
        assert recipe.kd is not None
        return cls(kinds, recipe.kd, require_scored(recipe))

    def use_store(self, manifest: Mapping[str, Any]) -> None:
        """Compare what the store keeps with the recipe, and take the teacher's mean log-probabilities.

        Raises:
            LossError: The store is not the one that the recipe asks for.
        """
        for key in ("topk", "tail_draws"):
            if manifest[key] != (asked := getattr(self.store, key)):
                raise LossError(
                    f"the top-K store was made with {key} = {manifest[key]}, and recipe.scored.{key} = "
                    f"{asked}; score it again with {key} = {asked}, or ask for {manifest[key]}"
                )
        if self.rescoring is not None:
            self.rescoring.take_means(manifest)

    def start(
        self, batches: Sequence[Batch], samples: Mapping[str, int], group: dist.ProcessGroup | None
    ) -> "GlobalBatch":
        """Count the tokens of each span and give the spans their weights in this batch."""
        if self.rescoring is not None:
            self.rescoring.require_means()
        self._require_fields(batches)
        counts = span_counts(batches, self.mixture.spans, group)
        return GlobalBatch(self, counts, self.mixture.of_batch(counts, samples), group)

    def _require_fields(self, batches: Sequence[Batch]) -> None:
        topk, draws = self.store.topk, self.store.tail_draws
        fields: dict[str, int | None] = {"teacher_ids": topk, "teacher_logprobs": topk, "teacher_tail": None}
        if self.target != "bucket":
            fields["teacher_draws"] = draws
        if self.rescoring is not None:
            fields[LABEL] = None
        require_fields(batches, self.scored, fields, "the top-K store")

    def rule(self, batch: Batch, weights: Tensor) -> "TokenRule | None":
        """Return the loss of a micro-batch's tokens, or None where cross-entropy is all of it.

        Args:
            batch: The micro-batch.
            weights: `[B, S]`, weight of each token in the sum.
        """
        if "teacher_ids" not in batch:
            return None
        rescoring = None if self.rescoring is None else self.rescoring.weights(batch)
        return TokenRule(
            batch, tokens_of(batch, self.scored), weights, self.target, self.kl_weight, rescoring
        )

    def token_measures(self, head: Head, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, the objective's own loss, and where tokens are scored the bucket's divergence."""
        self._require_fields([batch])
        mask = batch["loss_mask"]
        rule = self.rule(batch, torch.zeros_like(mask))
        if rule is None:
            losses = self.token_losses(head, hidden, batch)
            return {"loss": losses, "objective": losses}
        head.support_loss(hidden, rule.support, rule, mask > 0)
        found = {"loss": rule.ce, "objective": rule.losses, "kl": rule.kl}
        return {name: values.view(mask.shape) for name, values in found.items()}


class TokenRule:
    """The loss of the tokens of one micro-batch, as `head.support_loss` asks for it.

    Every token of the batch, scored or not, goes through the head once; its support is its label, the K ids
    and the draws.

    Args:
        batch: With the fields of `common.scored`, `[B, S, ...]`.
        scored: `[B, S]`, tokens that have a divergence.
        weights: `[B, S]`, weight of each token in the sum.
        target: Of the module's.
        kl_weight: a.
        rescoring: `[B, S]`, w, or None for 1.

    Attributes:
        support: int64 `[B, S, n]`.
        ce, kl, losses, teacher_mass, lead: Float32 or float64 `[B * S]`, filled as the rule is asked:
            cross-entropy, the bucket's divergence, the loss without the token's weight, the teacher's mass on
            the kept ids, and the student's log-probability of the teacher's likeliest id.
    """

    def __init__(
        self,
        batch: Batch,
        scored: Tensor,
        weights: Tensor,
        target: Target,
        kl_weight: float,
        rescoring: Tensor | None,
    ) -> None:
        ids = batch["teacher_ids"]
        parts = [batch["labels"].unsqueeze(-1), ids]
        self._draws = 0
        if target != "bucket":
            parts.append(batch["teacher_draws"])
            self._draws = batch["teacher_draws"].shape[-1]
        self.support = torch.cat(parts, dim=-1)
        self._topk, self._target, self._kl_weight = ids.shape[-1], target, kl_weight
        self._scored, self._weights = scored.reshape(-1), weights.reshape(-1)
        self._rescoring = None if rescoring is None else rescoring.reshape(-1)
        self._ids = ids.reshape(-1, self._topk)
        self._logprobs = batch["teacher_logprobs"].reshape(-1, self._topk)
        self._tail = torch.where(scored, batch["teacher_tail"], 0.0).reshape(-1)
        size = self._tail.shape
        self.ce, self.kl, self.losses, self.teacher_mass, self.lead = (
            torch.zeros(size, dtype=torch.float64, device=self._tail.device) for _ in range(5)
        )

    def __call__(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted losses [c] of a chunk of tokens."""
        wide, scored = logprobs.dtype, self._scored[rows]
        present = (self._ids[rows] >= 0) & scored.unsqueeze(1)
        teacher = torch.where(present, self._logprobs[rows].to(wide), 0.0)
        student = torch.where(present, logprobs[:, 1 : 1 + self._topk], 0.0)
        q = torch.where(present, teacher.exp(), 0.0)
        tail = self._tail[rows].to(wide)
        ce = -logprobs[:, 0]
        kept = (q * (teacher - student)).sum(dim=1)
        rest = (1 - torch.where(present, student.exp(), 0.0).sum(dim=1)).clamp(min=LEAST_MASS)
        others = tail * tail.clamp(min=LEAST_MASS).log()
        bucket = kept + others - tail * rest.log()
        unbiased = None
        if self._draws:
            drawn = logprobs[:, 1 + self._topk :]
            drawn = torch.where(scored.unsqueeze(1) & (drawn > -torch.inf), drawn, 0.0)
            unbiased = kept + others - tail / self._draws * drawn.sum(dim=1)
        kl = self.divergence(bucket, unbiased, kept, q, student)
        weighed = ce if self._rescoring is None else self._rescoring[rows].to(wide) * ce
        losses = torch.where(scored, self._kl_weight * kl + (1 - self._kl_weight) * weighed, ce)
        for name, values in (
            ("ce", ce),
            ("kl", torch.where(scored, bucket, 0.0)),
            ("losses", losses),
            ("teacher_mass", q.sum(dim=1)),
            ("lead", logprobs[:, 1]),
        ):
            getattr(self, name)[rows] = values.detach().double()
        return self._weights[rows].to(wide) * losses

    def divergence(
        self, bucket: Tensor, unbiased: Tensor | None, kept: Tensor, q: Tensor, student: Tensor
    ) -> Tensor:
        """Return the divergence that is trained on [c].

        Args:
            bucket: The target `bucket` [c].
            unbiased: The target `unbiased` [c], where there are draws.
            kept: What both have of the kept ids, `sum_K q_k (log q_k - log p_k)` [c].
            q: The teacher's probabilities of these [c, K], 0 where there is none.
            student: The student's log-probabilities of these [c, K], 0 where there is none.
        """
        if unbiased is None:
            return bucket
        return unbiased if self._target == "unbiased" else (bucket + unbiased) / 2


class GlobalBatch(MeasuredBatch[TopKDivergence]):
    """One global batch of divergence and cross-entropy."""

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum of the micro-batch's token losses, each by the weight of its span over the span's tokens."""
        weights = token_weights(batch, self.counts, self.weighted)
        select = batch["loss_mask"] > 0
        rule = self.objective.rule(batch, weights)
        if rule is None:
            loss, ce = head.cross_entropy(hidden, batch["labels"], weights, select)
            self.measured.add(batch, ce)
            return loss
        highest = torch.zeros(select.shape, dtype=torch.float32, device=select.device)
        loss, _ = head.support_loss(hidden, rule.support, rule, select, highest)
        self.measured.add(batch, rule.losses)
        values = {
            "ce": rule.ce,
            "kl": rule.kl,
            "teacher_mass": rule.teacher_mass,
            "top1_agreement": rule.lead.float() >= highest.view(-1),
        }
        if self.objective.rescoring is not None:
            values["rescoring"] = self.objective.rescoring.weights(batch)
        self.measures.add(batch, values)
        return loss


OBJECTIVE = TopKDivergence
