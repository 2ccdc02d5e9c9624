"""Rollouts as bytes: one safetensors file a round in `rollouts/`, and the buffer in a resume checkpoint.

Both are functions of what they hold alone: a round that is made again has the same file. A round's file has
12 bytes a sampled token (`ids` int32, `behaviour_logprob` and `teacher_logprob` float32) and 22 a rollout;
prompts are named by their conversation. The buffer's has prompts and the teacher's likeliest tokens too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trainer.contract.canonical import canonical_json
from trainer.contract.json_text import parse_json
from trainer.errors import DataError
from trainer.rollouts.curriculum import MODES
from trainer.rollouts.rollout import Request, Rollout, Score

HISTORY_SCHEMA = "vpmoe.rollouts/1"
BUFFER_SCHEMA = "vpmoe.rollout_buffer/1"
_HEADER = "rollouts"  # one key: safetensors writes several in an order of its own

Arrays = dict[str, NDArray[Any]]


def round_name(number: int) -> str:
    """Name of a round's file."""
    return f"round_{number:07d}.safetensors"


def round_bytes(number: int, rollouts: Sequence[Rollout]) -> bytes:
    """Return the file of a round whose scores are there."""
    arrays = _sampled(rollouts)
    arrays["teacher_logprob"] = _joined([_score(one).logprob for one in rollouts], np.float32)
    header = {"schema": HISTORY_SCHEMA, "round": number, "born": rollouts[0].born, "modes": list(MODES)}
    return _file(arrays, header)


def read_round(content: bytes) -> tuple[dict[str, Any], Arrays]:
    """Read a round's file: its header, and its arrays.

    Raises:
        DataError: It is damaged, or not one.
    """
    return _read(content, HISTORY_SCHEMA, "a round of rollouts")


def buffer_bytes(
    pool: Sequence[Rollout], under_way: Mapping[int, Sequence[Rollout]], state: Mapping[str, Any]
) -> bytes:
    """Return everything that a run needs to go on with its rollouts.

    Args:
        pool: Scored rollouts that wait for a row.
        under_way: Rounds by number, each wholly scored or not at all.
        state: JSON values that go along.
    """
    rounds = [(number, under_way[number]) for number in sorted(under_way)]
    everything = [*pool, *(one for _, rollouts in rounds for one in rollouts)]
    scored = [one for one in everything if one.score is not None]
    arrays = _sampled(everything) | {
        "prompts": _joined([one.request.prompt for one in everything], np.int32),
        "prompt_lengths": np.array([len(one.request.prompt) for one in everything], dtype=np.int32),
        "numbers": np.array([one.number for one in everything], dtype=np.int64),
        "births": np.array([one.born for one in everything], dtype=np.int64),
        "scored": np.array([one.score is not None for one in everything], dtype=np.uint8),
        "teacher_logprob": _joined([_score(one).logprob for one in scored], np.float32),
        "teacher_tail": _joined([_score(one).tail for one in scored], np.float32),
        "teacher_ids": _joined([_score(one).ids.reshape(-1) for one in scored], np.int32),
        "teacher_logprobs": _joined([_score(one).logprobs.reshape(-1) for one in scored], np.float32),
    }
    header = {
        "schema": BUFFER_SCHEMA,
        "pool": len(pool),
        "rounds": [[number, len(rollouts)] for number, rollouts in rounds],
        "topk": _score(scored[0]).ids.shape[1] if scored else 0,
        "state": dict(state),
    }
    return _file(arrays, header)


def read_buffer(content: bytes) -> tuple[list[Rollout], dict[int, tuple[Rollout, ...]], dict[str, Any]]:
    """Read what `buffer_bytes` wrote: pool, rounds under way, state.

    Raises:
        DataError: It is damaged, or not one.
    """
    header, arrays = _read(content, BUFFER_SCHEMA, "a buffer of rollouts")
    topk = int(header["topk"])
    lengths, prompts = arrays["lengths"].tolist(), arrays["prompt_lengths"].tolist()
    ids, behaviour = _cut(arrays["ids"], lengths), _cut(arrays["behaviour_logprob"], lengths)
    asked = _cut(arrays["prompts"], prompts)
    scored = arrays["scored"].astype(bool).tolist()
    judged = [length for length, there in zip(lengths, scored, strict=True) if there]
    wide = [length * topk for length in judged]
    scores = iter(
        Score(logprob, top.reshape(-1, topk), logprobs.reshape(-1, topk), tail)
        if topk
        else Score(logprob, top.reshape(len(logprob), 0), logprobs.reshape(len(logprob), 0), tail)
        for logprob, top, logprobs, tail in zip(
            _cut(arrays["teacher_logprob"], judged),
            _cut(arrays["teacher_ids"], wide),
            _cut(arrays["teacher_logprobs"], wide),
            _cut(arrays["teacher_tail"], judged),
            strict=True,
        )
    )
    found = []
    for place, there in enumerate(scored):
        request = Request(
            int(arrays["epochs"][place]),
            int(arrays["documents"][place]),
            int(arrays["samples"][place]),
            MODES[int(arrays["modes"][place])],
            asked[place],
        )
        found.append(
            Rollout(
                request,
                int(arrays["numbers"][place]),
                int(arrays["births"][place]),
                ids[place],
                behaviour[place],
                bool(arrays["stopped"][place]),
                next(scores) if there else None,
            )
        )
    start = int(header["pool"])
    under_way = {}
    for number, count in header["rounds"]:
        under_way[int(number)] = tuple(found[start : start + count])
        start += count
    return found[: int(header["pool"])], under_way, header["state"]


def _score(one: Rollout) -> Score:
    if one.score is None:
        raise ValueError(f"a rollout of round {one.number} has no score yet")
    return one.score


def _sampled(rollouts: Sequence[Rollout]) -> Arrays:
    requests = [one.request for one in rollouts]
    return {
        "ids": _joined([one.ids for one in rollouts], np.int32),
        "behaviour_logprob": _joined([one.behaviour for one in rollouts], np.float32),
        "lengths": np.array([len(one.ids) for one in rollouts], dtype=np.int32),
        "stopped": np.array([one.stopped for one in rollouts], dtype=np.uint8),
        "epochs": np.array([request.epoch for request in requests], dtype=np.int32),
        "documents": np.array([request.document for request in requests], dtype=np.int64),
        "samples": np.array([request.sample for request in requests], dtype=np.int32),
        "modes": np.array([MODES.index(request.mode) for request in requests], dtype=np.uint8),
    }


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])


def _cut(joined: NDArray[Any], lengths: Sequence[int]) -> list[NDArray[Any]]:
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _file(arrays: Arrays, header: Mapping[str, Any]) -> bytes:
    return bytes(save(arrays, metadata={_HEADER: canonical_json(header)}))


def _read(content: bytes, schema: str, what: str) -> tuple[dict[str, Any], Arrays]:
    try:
        size = int.from_bytes(content[:8], "little")
        header = dict(parse_json(parse_json(content[8 : 8 + size])["__metadata__"][_HEADER]))
        arrays = load(content)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{what} cannot be read ({type(error).__name__}: {error})") from error
    if header.get("schema") != schema:
        raise DataError(f"{what} has schema {header.get('schema')!r}, expected {schema!r}")
    return header, arrays
