"""A teacher's answers, kept as they come: what was answered once is answered the same after a restart.

One line of JSON an answer, appended and brought to the disk before anyone sees the answer:

    {"key": …, "shape": [n, K, M], "scores": base64, "crc32": …}

The key is a digest of the question: the teacher's identity, the tokens, the positions and what is asked of
them. A line that a crash cut short is dropped when the journal is opened.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from trainer.contract.canonical import canonical_json
from trainer.contract.files import sync
from trainer.contract.json_text import parse_json
from trainer.errors import TeacherError
from trainer.teacher.teacher import TailDraws, Teacher, TeacherScores


class JournalledTeacher(Teacher):
    """Asks a teacher what its journal does not know.

    Args:
        teacher: Whom to ask; closed with this one.
        path: The journal; made where there is none. One process at a time writes it.

    Raises:
        TeacherError: A line of the journal, other than a last one cut short, is damaged.
    """

    def __init__(self, teacher: Teacher, path: Path) -> None:
        self.teacher, self.path = teacher, path
        self.kind = teacher.kind  # type: ignore[misc]  # of the class elsewhere, of who is asked here
        self.vocab_size, self.context = teacher.vocab_size, teacher.context
        self.tokenizer_sha256 = teacher.tokenizer_sha256
        self.replayed = 0
        self._places = _open(path)
        self._file = path.open("ab")
        sync(path.parent)

    def identity(self) -> dict[str, Any]:
        """Return that of the teacher."""
        return self.teacher.identity()

    def voices(self) -> list[tuple[str, Teacher]]:
        """Return those of the teacher: a test of what it says now asks no journal."""
        return self.teacher.voices()

    def give_up(self) -> None:
        """Have the teacher give up; what it has answered is kept."""
        self.teacher.give_up()

    def close(self) -> None:
        """Close the journal and the teacher."""
        self._file.close()
        self.teacher.close()

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        tail: TailDraws | None,
    ) -> list[TeacherScores]:
        who = canonical_json(self.identity())
        keys = [
            _key(
                who, tokens, positions, topk, mass, None if tail is None else (tail.count, tail.keys[number])
            )
            for number, (tokens, positions) in enumerate(zip(sequences, wanted, strict=True))
        ]
        missing = [number for number, key in enumerate(keys) if key not in self._places]
        self.replayed += len(keys) - len(missing)
        if missing:
            answers = self.teacher.score(
                [sequences[number] for number in missing],
                [wanted[number] for number in missing],
                topk,
                mass=mass,
                tail=None
                if tail is None
                else TailDraws(tail.count, [tail.keys[number] for number in missing]),
            )
            self._append([(keys[number], answer) for number, answer in zip(missing, answers, strict=True)])
        with self.path.open("rb") as file:
            return [_read(file, self._places[key]) for key in keys]

    def _append(self, answers: Sequence[tuple[str, TeacherScores]]) -> None:
        place = self._file.tell()
        for key, scores in answers:
            if key in self._places:
                continue  # asked twice in one call
            line = _line(key, scores)
            self._file.write(line)
            self._places[key] = place
            place += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())


def _key(
    who: str,
    tokens: Sequence[int],
    positions: Sequence[int],
    topk: int,
    mass: float | None,
    tail: tuple[int, int] | None,
) -> str:
    digest = hashlib.sha256(canonical_json([who, topk, mass, tail and [tail[0], f"{tail[1]:x}"]]).encode())
    for values in (tokens, positions):
        array = np.asarray(values, dtype="<i8")
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def _line(key: str, scores: TeacherScores) -> bytes:
    body = b"".join(
        np.ascontiguousarray(array, dtype=dtype).tobytes()
        for array, dtype in (
            (scores.label_logprob, "<f4"),
            (scores.tail_mass, "<f4"),
            (scores.ids, "<i4"),
            (scores.logprobs, "<f4"),
            (scores.draws, "<i4"),
        )
    )
    return (
        json.dumps(
            {
                "key": key,
                "shape": [len(scores), scores.ids.shape[1], scores.draws.shape[1]],
                "scores": base64.b64encode(body).decode("ascii"),
                "crc32": zlib.crc32(body),
            },
            separators=(",", ":"),
        ).encode("ascii")
        + b"\n"
    )


def _parse(line: bytes) -> tuple[str, TeacherScores]:
    """Read a line.

    Raises:
        ValueError: It is damaged.
    """
    try:
        entry = parse_json(line)
        key, (n, k, m) = str(entry["key"]), map(index, entry["shape"])
        body = base64.b64decode(entry["scores"], validate=True)
        if zlib.crc32(body) != entry["crc32"] or min(n, k, m) < 0 or len(body) != 4 * n * (2 + 2 * k + m):
            raise ValueError("its scores are not those that were written")
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no entry of a journal ({error!r})") from error
    words = np.frombuffer(body, dtype="<i4")
    label, tail, ids, logprobs, draws = np.split(words, np.cumsum([n, n, n * k, n * k]))
    return key, TeacherScores(
        label.view("<f4").astype(np.float32),
        ids.reshape(n, k).astype(np.int32),
        logprobs.view("<f4").reshape(n, k).astype(np.float32),
        tail.view("<f4").astype(np.float32),
        draws.reshape(n, m).astype(np.int32),
    )


def _read(file: Any, place: int) -> TeacherScores:
    file.seek(place)
    return _parse(file.readline())[1]


def _open(path: Path) -> dict[str, int]:
    """Return where each answer stands; what a crash has left half-written at the end goes."""
    places: dict[str, int] = {}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return places
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                key, _ = _parse(line)
            except ValueError as error:
                raise TeacherError(
                    f"{path}: line {number} is damaged ({error}); remove it and what follows to ask the "
                    "teacher "
                    "again from there, or the file to ask for everything again"
                ) from error
            places[key] = whole
            whole += len(line)
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return places
