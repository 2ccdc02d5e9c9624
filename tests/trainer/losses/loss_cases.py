"""A head, a teacher and micro-batches that a teacher has scored, for the objectives that learn from one."""

from typing import Any

import torch
import torch.nn.functional as F

from tests.trainer.train.train_jobs import tiny_recipe
from trainer.contract.schema.base import parse
from trainer.contract.schema.training import TrainRecipe
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.support_loss import chunked_support_loss

B, S, H, V = 2, 8, 6, 19
K, M = 4, 3
MEANS = {"reasoning": -2.5, "final": -3.0}
MANIFEST = {"topk": K, "tail_draws": M, "span_means": MEANS}
Part = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Hidden states `[S, B, H]` and a micro-batch."""


def recipe(**changes: Any) -> TrainRecipe:
    return parse(TrainRecipe, tiny_recipe(**changes))


def scored_table(topk: int = K, tail_draws: int = M) -> dict[str, Any]:
    return {"fraction": 0.5, "subset_fraction": 1.0, "topk": topk, "tail_draws": tail_draws}


class Head(torch.nn.Module):
    """An output head and the losses of the reference backend, a few tokens at a time."""

    def __init__(self, weight: torch.Tensor | None = None, group: Any = None) -> None:
        super().__init__()
        if weight is None:
            generator = torch.Generator().manual_seed(3)
            weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
        self.weight, self.group = torch.nn.Parameter(weight), group

    def _flat(self, hidden):
        return hidden.transpose(0, 1).reshape(-1, H)

    def cross_entropy(self, hidden, labels, weights, select):
        flags = (labels.reshape(-1), weights.reshape(-1))
        loss, each = chunked_cross_entropy(
            self._flat(hidden), self.weight, *flags, select=select.reshape(-1), group=self.group
        )
        return loss, each.view(labels.shape)

    def support_loss(self, hidden, support, rule, select, highest=None):
        loss, each = chunked_support_loss(
            self._flat(hidden),
            self.weight,
            support.flatten(0, 1),
            rule,
            select=select.reshape(-1),
            highest=None if highest is None else highest.view(-1),
            group=self.group,
            chunk_tokens=5,
        )
        return loss, each.view(select.shape)


def teacher_of(batch: dict[str, torch.Tensor], seed: int, topk: int = K, draws: int = M) -> torch.Tensor:
    """Add what a store would hold of a random teacher; return its log-probabilities `[B, S, V]` float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch["labels"].shape, V)
    logprobs = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(dim=-1)
    kept, ids = logprobs.topk(topk, dim=-1)
    tail = logprobs.exp().scatter(-1, ids, 0.0)
    mass = tail.sum(dim=-1)
    # Where K is the vocabulary there is no tail to draw from.
    drawn = torch.multinomial((tail + 1e-12).flatten(0, 1), draws, replacement=True, generator=generator)
    batch |= {
        "teacher_ids": ids,
        "teacher_logprobs": kept.float(),
        "teacher_tail": mass.clamp(min=0).float(),
        "teacher_draws": drawn.view(*batch["labels"].shape, draws),
        "teacher_label_logprob": logprobs.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1).float(),
    }
    return logprobs


def micro_batch(seed: int, spans: tuple[int, ...]) -> Part:
    """Some tokens unsupervised, the others of these spans; no field of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(spans)[torch.randint(len(spans), (B, S), generator=generator)]
    mask = (torch.rand(B, S, generator=generator) < 0.8).float()
    mask[0, : len(spans)], chosen[0, : len(spans)] = 1.0, torch.tensor(spans)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(V, (B, S), generator=generator)
    return hidden, {"labels": labels, "loss_mask": mask, "span_id": torch.where(mask > 0, chosen, 0)}


def scored_batch(seed: int, spans: tuple[int, ...] = (4, 5), topk: int = K) -> tuple[Part, torch.Tensor]:
    """One with fields of a teacher, fillers where a token is not scored; and the teacher."""
    hidden, batch = micro_batch(seed, spans)
    teacher = teacher_of(batch, seed + 100, topk)
    other = batch["span_id"] < 4
    for name, filler in (("ids", -1), ("draws", -1), ("logprobs", -torch.inf)):
        batch[f"teacher_{name}"][other] = filler
    for name in ("tail", "label_logprob"):
        batch[f"teacher_{name}"][other] = 0.0
    return (hidden, batch), teacher


def run(objective, head, parts, samples, group=None):
    """Loss, gradients of head and hidden states, and metrics of one global batch."""
    step = objective.start([batch for _, batch in parts], samples, group)
    head.weight.grad = None
    total = 0.0
    for hidden, batch in parts:
        hidden.grad = None
        loss = step.loss(head, hidden, batch)
        loss.backward()
        total += loss.item()
    return total, [head.weight.grad, *(hidden.grad.clone() for hidden, _ in parts)], step.metrics()


def student_logprobs(head, hidden) -> torch.Tensor:
    """Dense log-probabilities `[B, S, V]`, differentiable."""
    return F.log_softmax(hidden.transpose(0, 1) @ head.weight.T, dim=-1)


def take(parts: list[Part], rows: list[int]) -> Part:
    """Rows of the micro-batches, counted through all of them, as one micro-batch."""
    hidden = torch.cat([hidden for hidden, _ in parts], dim=1)[:, rows].detach().requires_grad_()
    return hidden, {name: torch.cat([batch[name] for _, batch in parts])[rows] for name in parts[0][1]}
