"""From rollouts to a row of training samples."""

from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.kd import Sample
from trainer.model.document_mask import PADDING
from trainer.rollouts.forms import Form
from trainer.rollouts.rollout import Rollout


def pack_row(
    rollouts: Sequence[Rollout], *, seq_len: int, eod: int, form: Form, topk: int, mask_control: bool
) -> Sample:
    """Put rollouts side by side, each a document of its own.

    Supervised is the prediction of sampled tokens alone. All fields are label-aligned, as in stored data: at
    position t they speak of token t + 1.

    Args:
        rollouts: Scored ones, which fit.
        seq_len: Tokens of the row, S.
        eod: Fills the rest.
        form: Gives the spans.
        topk: K of the teacher's likeliest tokens to take along; 0 for none.
        mask_control: Mark control tokens as `excluded`.

    Returns:
        Tensors [S]: `tokens`, `labels`, `span_id`, `position_ids`, `doc_id` int64, `loss_mask`,
        `teacher_label_logprob`, `behaviour_logprob` float32, `excluded` bool; with K > 0 also `teacher_ids`
        int64 and `teacher_logprobs` float32 [S, K], and `teacher_tail` float32.

    Raises:
        ValueError: They do not fit, or one has no score.
    """
    if (total := sum(one.length for one in rollouts)) > seq_len:
        raise ValueError(f"{len(rollouts)} rollouts of {total} tokens do not fit a row of {seq_len}")
    tokens, labels = (np.full(seq_len, eod, dtype=np.int64) for _ in range(2))
    span_id, position_ids = (np.zeros(seq_len, dtype=np.int64) for _ in range(2))
    doc_id = np.full(seq_len, PADDING, dtype=np.int64)
    loss_mask, teacher, behaviour, tail = (np.zeros(seq_len, dtype=np.float32) for _ in range(4))
    excluded = np.zeros(seq_len, dtype=np.bool_)
    ids = np.full((seq_len, topk), -1, dtype=np.int64)
    logprobs = np.full((seq_len, topk), -np.inf, dtype=np.float32)
    start = 0
    for number, one in enumerate(rollouts):
        if one.score is None:
            raise ValueError(f"a rollout of round {one.number} has no score yet")
        stop = start + one.length
        row = one.tokens
        tokens[start:stop] = row
        labels[start : stop - 1] = row[1:]
        position_ids[start:stop] = np.arange(one.length)
        doc_id[start:stop] = number
        sampled = slice(start + len(one.request.prompt) - 1, stop - 1)
        loss_mask[sampled] = 1.0
        span_id[sampled] = form.spans(one.ids.tolist())
        teacher[sampled] = one.score.logprob
        behaviour[sampled] = one.behaviour
        if mask_control:
            excluded[sampled] = form.control(one.ids)
        if topk:
            ids[sampled] = one.score.ids
            logprobs[sampled] = one.score.logprobs
            tail[sampled] = one.score.tail
        start = stop
    fields = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "span_id": span_id,
        "position_ids": position_ids,
        "doc_id": doc_id,
        "teacher_label_logprob": teacher,
        "behaviour_logprob": behaviour,
        "excluded": excluded,
    }
    if topk:
        fields |= {"teacher_ids": ids, "teacher_logprobs": logprobs, "teacher_tail": tail}
    return {name: torch.from_numpy(field) for name, field in fields.items()}
