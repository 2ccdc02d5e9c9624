"""Structured truncation: what to cut from a conversation that is longer than the sequence.

Reasoning is cut first, then the question, each from its beginning; headers, system, developer and the final
answer are never cut. Cuts are made on token ids, so what stays is what the model would have seen.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

DROP_FINAL_TOO_LONG = "drop_final_too_long"
DROP_NO_ROOM = "drop_no_room"
DROP_REASONS = (DROP_FINAL_TOO_LONG, DROP_NO_ROOM)
#: Named in the configuration hash: another policy is another data set.
POLICY = "analysis-then-user-head/1"


@dataclass(frozen=True, slots=True)
class Cut:
    """First kept position in the user and analysis contents, or the reason to drop the conversation."""

    user_from: int = 0
    analysis_from: int = 0
    drop: str | None = None


KEEP = Cut()


def plan_cut(
    user: npt.NDArray[Any],
    analysis: npt.NDArray[Any],
    *,
    final_part: int,
    other: int,
    seq_len: int,
    continuation: npt.NDArray[np.bool_],
) -> Cut:
    """Decide how a conversation fits into `seq_len` tokens.

    Args:
        user: [U] content ids of the latest user message.
        analysis: [A] content ids of the analysis message before the final one.
        final_part: Tokens of the final message with its wrapper and terminator, plus the EOD.
        other: All tokens that are neither in `user` nor in `analysis` (so it includes `final_part`).
        seq_len: The longest conversation allowed, EOD included.
        continuation: [V] bool, whether a token starts inside a UTF-8 character.

    Returns:
        The cut. A kept part never starts inside a character, so it may be a little shorter than the room.
    """
    room = seq_len - other
    if user.size + analysis.size <= room:
        return KEEP
    if final_part > seq_len:
        return Cut(drop=DROP_FINAL_TOO_LONG)
    analysis_room = room - user.size
    if analysis_room >= 0:
        return Cut(analysis_from=_whole_character(analysis, analysis.size - analysis_room, continuation))
    if room < 1:
        return Cut(drop=DROP_NO_ROOM)
    user_from = _whole_character(user, user.size - room, continuation)
    if user_from == user.size:
        return Cut(drop=DROP_NO_ROOM)
    return Cut(user_from=user_from, analysis_from=int(analysis.size))


def _whole_character(ids: npt.NDArray[Any], start: int, continuation: npt.NDArray[np.bool_]) -> int:
    while start < ids.size and continuation[ids[start]]:
        start += 1
    return int(start)
