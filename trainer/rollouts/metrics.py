"""What a step logs of its rollouts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainer.job.metrics import Value
from trainer.rollouts.clock import Clock
from trainer.rollouts.curriculum import MODES
from trainer.rollouts.forms import SPAN_FINAL, SPAN_REASONING, Form
from trainer.rollouts.rollout import Rollout, Score

SPANS = {SPAN_REASONING: "rollout_reasoning", SPAN_FINAL: "rollout_final"}


def round_metrics(rollouts: Sequence[Rollout], form: Form) -> dict[str, Value]:
    """Describe the round that a step was given.

    Args:
        rollouts: Scored ones.
        form: Of their answers.

    Returns:
        `rollouts/mode/<mode>`: how many prompts asked for it; `rollouts/length` and
        `rollouts/length/<mode>`: mean tokens of an answer; `rollouts/end_rate`: share that a stop id ended;
        `rollouts/valid_rate`: share that has the form; `rollouts/entropy`: minus the mean log-probability of
        the sampled tokens under the student that sampled them, at temperature 1 an unbiased estimate of its
        entropy; `rollouts/teacher_gap/<span>`: mean of the teacher's log-probability less that;
        `rollouts/in_teacher_topk` and `rollouts/is_teacher_top1`: share of sampled tokens among the teacher's
        likeliest, where those were asked for.
    """
    lengths = np.array([len(one.ids) for one in rollouts])
    modes = [one.request.mode for one in rollouts]
    scores: list[Score] = [one.score for one in rollouts if one.score is not None]
    behaviour = np.concatenate([one.behaviour for one in rollouts]).astype(np.float64)
    teacher = np.concatenate([score.logprob for score in scores]).astype(np.float64)
    spans = np.concatenate([form.spans(one.ids.tolist()) for one in rollouts])
    count = Counter(modes)
    found: dict[str, Value] = {f"rollouts/mode/{mode}": count[mode] for mode in MODES}
    found |= {
        f"rollouts/length/{mode}": float(lengths[[mode == one for one in modes]].mean())
        for mode in MODES
        if count[mode]
    }
    found |= {
        "rollouts/length": float(lengths.mean()),
        "rollouts/end_rate": float(np.mean([one.stopped for one in rollouts])),
        "rollouts/valid_rate": float(np.mean([form.valid(one.ids.tolist()) for one in rollouts])),
        "rollouts/entropy": float(-behaviour.mean()),
    }
    for number, name in SPANS.items():
        if (inside := spans == number).any():
            found[f"rollouts/teacher_gap/{name}"] = float((teacher - behaviour)[inside].mean())
    if scores[0].ids.shape[1]:
        ids = np.concatenate([score.ids for score in scores])
        sampled = np.concatenate([one.ids for one in rollouts])[:, None]
        found["rollouts/in_teacher_topk"] = float((ids == sampled).any(axis=1).mean())
        found["rollouts/is_teacher_top1"] = float((ids[:, :1] == sampled).mean())
    return found


def step_metrics(
    rows: Sequence[Sequence[Rollout]], clock: Clock, step: int, seq_len: int
) -> dict[str, Value]:
    """Describe what a step trains on.

    Args:
        rows: Its rows.
        clock: Says how old what is.
        step: The step.
        seq_len: Tokens of a row.

    Returns:
        `rollouts/trained`; `rollouts/staleness/<n>`: how many of them are n steps old, for every n that there
        may be; `rollouts/fill`: share of the rows' tokens that they take.
    """
    taken = [one for row in rows for one in row]
    ages = Counter(clock.staleness(one.born, step) for one in taken)
    found: dict[str, Value] = {"rollouts/trained": len(taken)}
    found |= {f"rollouts/staleness/{age}": ages[age] for age in range(clock.max_staleness + 1)}
    found["rollouts/fill"] = sum(one.length for one in taken) / (len(rows) * seq_len) if rows else 0.0
    return found
