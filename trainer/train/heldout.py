"""The held-out loss: each kind of validation samples on its own, and two numbers for the run.

`heldout_loss` is a mean over tokens, whatever their span; the training loss is a sum of span means with the
weights of the recipe. One model therefore has different values of the two, and their curves cannot be laid
over each other. `heldout_objective` is the training objective on held-out samples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.contract.schema.training import TrainingConfig
from trainer.data.kd import Sample
from trainer.data.sampler import held_out
from trainer.job.distributed import Layout
from trainer.losses.common.mixture import Mixture, Part
from trainer.losses.common.objective import Objective
from trainer.train.inputs import INPUT_OF, DataPart, TrainingData

HELD_OUT_BATCHES = 2
"""Global batches that one held-out loss is measured on, always the same ones; kinds share them evenly."""


@torch.no_grad()
def measure_held_out(
    token_measures: Callable[[Sample], Mapping[str, Tensor]],
    data: TrainingData,
    objective: Objective,
    settings: TrainingConfig,
    layout: Layout,
) -> dict[str, Any]:
    """Mean cross-entropy over supervised tokens of the first samples of every validation split.

    Always the same samples, whatever the layout, and the same number of forward passes on every rank, as
    expert parallelism needs. Collective.

    Args:
        token_measures: Of a micro-batch, see `Objective.token_measures`.
        data: The open data.
        objective: Says which kinds there are, which spans they have, and what their losses amount to.
        settings: Batch sizes.
        layout: The parallel layout.

    Returns:
        `heldout_loss/<part>` for `conversations` and `text`, whichever the run mixes: the mean over the
        part's supervised tokens; `heldout_loss/reasoning` and `heldout_loss/final`, the same by span; what
        else the objective measures, such as `heldout_kl/scored` and `heldout_kl/scored_final`;
        `heldout_tokens/<part>` and their sum `heldout_tokens`; `heldout_loss`, the number to watch: the
        parts' losses weighted by their shares of the training samples; and `heldout_objective`: what
        `trainer.losses` would make of these samples as one global batch, mixed by those same shares.

    Raises:
        ValueError: A validation split has less than one global batch, or nothing supervised.
    """
    result: dict[str, Any] = {"heldout_loss": 0.0, "heldout_objective": 0.0, "heldout_tokens": 0}
    means: list[float] = []
    found: list[float] = []
    parts = [part for part in objective.mixture.parts if part.name in data.parts]
    shares = _shares(data, objective, parts)
    for part in objective.mixture.parts:
        if part not in parts:  # made while training: there is nothing of it to hold out
            means += [0.0] * len(part.spans.spans)
            found += [0.0] * len(part.spans.spans)
            continue
        batches = max(1, HELD_OUT_BATCHES // len(parts))
        sums, counts = _sums(token_measures, data.parts[part.name], part, batches, settings, layout)
        tokens = int(sum(counts))
        if not tokens:
            raise ValueError(
                f"the validation samples of {INPUT_OF[part.name]} have no supervised token: no held-out loss"
            )
        means += [total / max(count, 1.0) for total, count in zip(sums.pop("objective"), counts, strict=True)]
        found += counts
        for measure, totals in sums.items():
            for name, total, count in zip(part.spans.names, totals, counts, strict=True):
                if count:
                    result[f"heldout_{measure}/{name}"] = total / count
            result[f"heldout_{measure}/{part.name}"] = sum(totals) / tokens
        result[f"heldout_tokens/{part.name}"] = tokens
        result["heldout_loss"] += shares[part.name] * result[f"heldout_loss/{part.name}"]
        result["heldout_tokens"] += tokens
    result["heldout_objective"] = objective.value(means, torch.tensor(found), shares)
    return result


def _shares(data: TrainingData, objective: Objective, parts: Sequence[Part]) -> dict[str, float]:
    """Return the shares of the measured kinds among the samples that data sets hold."""
    shares = {part.name: data.parts[part.name].share for part in parts}
    if len(parts) == len(objective.mixture.parts):
        return shares
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _sums(
    token_measures: Callable[[Sample], Mapping[str, Tensor]],
    data: DataPart,
    part: Part,
    batches: int,
    settings: TrainingConfig,
    layout: Layout,
) -> tuple[dict[str, list[float]], list[float]]:
    """Return each measure, summed over the spans, and their supervised tokens, over all ranks."""
    size = data.valid.num_samples(0)
    batches = min(size // settings.global_batch_size, batches)
    if batches == 0:
        raise ValueError(
            f"the validation split of {INPUT_OF[part.name]} gives {size} samples, a held-out loss needs at "
            f"least one global batch of {settings.global_batch_size}; build more rows or raise valid_fraction"
        )
    spans = part.spans.spans
    counts = torch.zeros(len(spans), dtype=torch.float64, device=layout.device)
    sums: dict[str, Tensor] = {}
    for cpu_batch in held_out(
        data.valid,
        micro_batch_size=settings.micro_batch_size,
        max_samples=batches * settings.global_batch_size,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp,
    ):
        batch = {name: tensor.to(layout.device) for name, tensor in cpu_batch.items()}
        measures = token_measures(batch)
        span_id, supervised = batch["span_id"], batch["loss_mask"] > 0
        for place, span in enumerate(spans):
            inside = (span_id == span.id) & supervised
            counts[place] += inside.sum()
            for name, values in measures.items():
                total = sums.setdefault(name, torch.zeros_like(counts))
                total[place] += values.double()[inside].sum()
    # All samples of a kind have the same fields, so every rank has measured the same.
    names = sorted(sums)
    gathered = torch.stack([counts, *(sums[name] for name in names)])
    dist.all_reduce(gathered, group=layout.dp_group)
    found, *totals = gathered.tolist()
    return dict(zip(names, totals, strict=True)), found


def describe_held_out(measured: list[dict[str, Any]], mixture: Mixture) -> dict[str, dict[str, float]]:
    """Return the course of each part's held-out loss over a run: where it started, ended, and was highest.

    Args:
        measured: Every measurement of the run, first to last.
        mixture: Says which kinds there are.
    """
    course = {}
    for name in mixture.names:
        if f"heldout_loss/{name}" not in measured[0]:
            continue  # a kind that is made while training
        losses = [point[f"heldout_loss/{name}"] for point in measured]
        course[name] = {
            "start": losses[0],
            "end": losses[-1],
            "highest": max(losses),
            "tokens": measured[-1][f"heldout_tokens/{name}"],
        }
    return course


def finite(measured: dict[str, Any]) -> bool:
    """Whether every measured loss is a number."""
    return all(math.isfinite(value) for value in measured.values())
