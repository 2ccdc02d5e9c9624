"""What the page of two compared artifacts shows beside `lineage.comparison`: curves, code, contents.

What payloads hold is compared when a reader asks for it, beside the pages: it reads all of both.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from trainer.contract.status import METRICS_NAME
from vpmoe_assets.browse.artifact import lines_of
from vpmoe_assets.browse.charts import Line, line_chart
from vpmoe_assets.lineage.code_changes import unified_between
from vpmoe_assets.lineage.comparison import Comparison
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.row_changes import compare_rows
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.tensors import compare_tensors

CONTENTS = {"checkpoint": "tensors", "data set": "rows"}
"""What can be compared of the payloads of a kind."""
_CURVES = {"loss": "Loss, nats", "heldout_loss": "Held-out loss, nats per token"}
_REMEMBERED = 8
_PATIENCE_S = 0.2


@dataclass(frozen=True)
class Contents:
    """The payloads of two artifacts compared.

    Attributes:
        what: `tensors` or `rows`; empty where nothing was asked for.
        found: `TensorChanges` or `RowChanges`; None while it is being found out, or where it cannot be.
        refused: Why it cannot be.
    """

    what: str = ""
    found: Any = None
    refused: str = ""

    @property
    def busy(self) -> bool:
        """Whether it is being found out."""
        return bool(self.what) and self.found is None and not self.refused


@dataclass
class OnDemand:
    """Comparisons of payloads, each made once, in a thread of its own."""

    store: Store
    _answers: dict[tuple[str, str, str], Contents] = field(default_factory=dict)
    _threads: dict[tuple[str, str, str], threading.Thread] = field(default_factory=dict)

    def of(self, what: str, old: Record, new: Record) -> Contents:
        """Return what is known of the contents of two artifacts, and have it found out where nothing is.

        Args:
            what: `tensors` or `rows`.
            old: The first.
            new: The second.
        """
        key = (what, old.record_digest, new.record_digest)
        if key not in self._answers:
            thread = self._threads.get(key)
            if thread is None:
                work = (key, old, new)
                thread = threading.Thread(target=self._find, args=work, name="contents", daemon=True)
                self._threads[key] = thread
                thread.start()
            thread.join(_PATIENCE_S)
        return self._answers.get(key, Contents(what))

    def _find(self, key: tuple[str, str, str], old: Record, new: Record) -> None:
        compare: Callable[..., Any] = compare_tensors if key[0] == "tensors" else compare_rows
        try:
            answer = Contents(key[0], compare(self.store.payload(old), self.store.payload(new)))
        except (LineageError, OSError, ValueError) as error:
            answer = Contents(key[0], refused=str(error))
        for oldest in list(self._answers)[: -_REMEMBERED + 1]:
            self._answers.pop(oldest, None)
        self._answers[key] = answer
        self._threads.pop(key, None)


def overlaid(store: Store, old: Record, new: Record) -> list[Markup]:
    """Return the curves of two training runs over each other; none where one has none."""
    points = [lines_of(store.directory(each) / "run" / METRICS_NAME) for each in (old, new)]
    if not all(points):
        return []
    drawn = []
    for key, title in _CURVES.items():
        lines = [
            Line(f"{name}: {each.version}", [(p["step"], p[key]) for p in run if key in p and "step" in p])
            for name, each, run in zip("AB", (old, new), points, strict=True)
        ]
        drawn.append(line_chart(lines, title=title))
    return [chart for chart in drawn if chart]


def code_lines(store: Store, old: Record, new: Record, found: Comparison) -> list[tuple[str, str]]:
    """Return the lines of the code's difference, each with its class in the style sheet."""
    try:
        lines = unified_between(ObjectStore(store.root), old, new, found.code)
        return [(_kind(line), line) for line in lines]
    except (LineageError, OSError, ValueError) as error:
        return [("at", f"the code cannot be shown: {error}")]


def _kind(line: str) -> str:
    if line.startswith("diff --git"):
        return "file"
    if line.startswith("@@"):
        return "at"
    if line.startswith(("+++", "---")):
        return "at"
    return {"+": "new", "-": "old"}.get(line[:1], "")
