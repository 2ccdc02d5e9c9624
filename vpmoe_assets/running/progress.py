"""What a terminal shows of a run: a line for each asset as it is done, and a bar for the one at work."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO, cast, get_args

import dagster as dg
from dagster import DagsterEvent, DagsterEventType, EventLogEntry

from vpmoe_assets.lineage.graph import HEADLINES
from vpmoe_assets.units import human_duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

How = Literal["made", "reused", "interrupted", "failed"]
HOW: tuple[How, ...] = get_args(How)
_STYLES: Mapping[str, str] = {
    "made": "green",
    "reused": "dim",
    "interrupted": "yellow",
    "failed": "bold red",
    "": "yellow",
}
_SCORES = ("core8/centered_mean", "ppl/text/nll")
"""Metrics that say most of an evaluation."""
_NUMBERS = 3
"""Headline numbers of an asset in its line."""
_WARNING = 30
_NARROWEST = 40


@dataclass
class Done:
    """What became of one asset.

    Attributes:
        asset: Bare name.
        how: `made`, `reused`, `interrupted` or `failed`.
        seconds: That it took in this run.
        version: In the store; None of one that failed.
        message: Of one that failed.
        failed_checks: Names of its checks that did not pass.
    """

    asset: str
    how: How
    seconds: float
    version: str | None = None
    message: str = ""
    failed_checks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


class _Lasting:
    """A stream that goes on taking text when nobody reads it any more: a run does not end for its display.

    A terminal that was closed answers with EIO, a pipe whose reader has ended with EPIPE.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        return self._unless_gone(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        """Pass on what was written, or drop it."""
        self._unless_gone(self._stream.flush, None)

    def _unless_gone[T](self, act: Callable[[], T], instead: T) -> T:
        if not self._gone:
            try:
                return act()
            except OSError:
                self._gone = True
        return instead


class Screen:
    """Follows a run's events.

    Args:
        stream: Where lines go; a bar is drawn where it is a terminal.
        why: Of each asset that is to be reused, the reason.
        steps: Of each training, its steps.
        metrics: Returns the numbers of an asset's latest version.
        names: Assets of which lines are printed; others (that stand for several) are passed over.

    Attributes:
        done: What became of each asset, in order.
        interrupted: Whether a step was.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        why: Mapping[str, str],
        steps: Mapping[str, int],
        metrics: Callable[[str], Mapping[str, Any]],
        names: frozenset[str],
    ) -> None:
        from rich.console import Console

        self.done: dict[str, Done] = {}
        self.interrupted = False
        self._console = Console(file=cast(TextIO, _Lasting(stream)), highlight=False, soft_wrap=True)
        self._console.width = max(self._console.width, _NARROWEST)
        self._why, self._steps, self._metrics, self._names = why, steps, metrics, names
        self._widest = max(map(len, names), default=0)
        self._since = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns,
                console=self._console,
                transient=True,
                redirect_stdout=False,  # which belong to the log
                redirect_stderr=False,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rest()
        if self._bar is not None:
            self._bar.stop()

    def follow(self, entry: EventLogEntry) -> None:
        """Take note of one event of the run."""
        event = entry.dagster_event
        if event is None:
            if int(entry.level) >= _WARNING:
                self._say("", entry.user_message.strip())
            return
        kinds: dict[DagsterEventType, Callable[[DagsterEvent], None]] = {
            DagsterEventType.STEP_START: self._started,
            DagsterEventType.ASSET_OBSERVATION: self._observed,
            DagsterEventType.ASSET_MATERIALIZATION: self._materialized,
            DagsterEventType.ASSET_CHECK_EVALUATION: self._checked,
            DagsterEventType.STEP_FAILURE: self._failed,
            DagsterEventType.STEP_SUCCESS: lambda _: self._rest(),
        }
        if (react := kinds.get(event.event_type)) is not None:
            react(event)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)

    def _started(self, event: DagsterEvent) -> None:
        self._since = time.monotonic()
        self._rest()
        if self._bar is not None:
            name = _asset(event)
            self._task = self._bar.add_task(name, total=self._steps.get(name))

    def _observed(self, event: DagsterEvent) -> None:
        seen = event.asset_observation_data.asset_observation
        numbers = {name: value.value for name, value in seen.metadata.items()}
        step, loss, name = numbers.get("step"), numbers.get("loss"), seen.asset_key.path[-1]
        if self._bar is None or self._task is None or not isinstance(step, int):
            return
        total = self._steps.get(name)
        text = f"{name}  step {step}" + (f" of {total}" if total else "")
        if isinstance(loss, float):
            text += f", loss {loss:.4g}"
        self._bar.update(self._task, completed=step, description=text)

    def _materialized(self, event: DagsterEvent) -> None:
        made = event.step_materialization_data.materialization
        name = made.asset_key.path[-1]
        if name not in self._names:
            return
        now = time.monotonic()
        tags = made.tags or {}
        how: How = "reused" if tags.get("vpmoe/reused") == "true" else "made"
        done = Done(name, how, now - self._since, tags.get("vpmoe/version"))
        self.done[name], self._since = done, now
        said = self._why.get(name, "recipe, code and inputs are unchanged") if how == "reused" else ""
        said = said or self._headline(name)
        self._say(how, f"{name:<{self._widest}}  {human_duration(done.seconds):>8}  {said}")

    def _checked(self, event: DagsterEvent) -> None:
        found = event.asset_check_evaluation_data
        if found.passed:
            return
        name = found.asset_key.path[-1]
        if (done := self.done.get(name)) is not None:
            done.failed_checks.append(found.check_name)
        blocks = ", which blocks what is made of it" if found.blocking else ""
        self._say(
            "", f"check {found.check_name} of {name} failed{blocks}: {found.description or ''}".rstrip(": ")
        )

    def _failed(self, event: DagsterEvent) -> None:
        name, message = _asset(event), failure_message(event)
        error = event.step_failure_data.error
        if error is not None and error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
            self.interrupted, message = True, "its processes have ended"
        how: How = "interrupted" if self.interrupted else "failed"
        self.done[name] = Done(name, how, time.monotonic() - self._since, message=message)
        self._rest()
        self._say(how, f"{name:<{self._widest}}  {message}")

    def _headline(self, name: str) -> str:
        metrics = self._metrics(name)
        told = [(key, metrics[key]) for key in (*HEADLINES, *_SCORES) if metrics.get(key) is not None]
        return ", ".join(f"{key} {_number(value)}" for key, value in told[:_NUMBERS])

    def _say(self, how: str, text: str) -> None:
        from rich.text import Text

        word = how or "warning"
        style = "" if how == "made" else _STYLES[how]
        line = Text(f"{word:<7} ", style=_STYLES[how])
        self._console.print(line.append(text, style=style))

    def _rest(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
        self._task = None


def failure_message(event: DagsterEvent) -> str:
    """Return what a failed step has to say to a user: without a traceback, the innermost message."""
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return data.user_failure_data.description
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    said = "" if error is None else " ".join(error.message.split())
    return said.removeprefix(f"dagster._core.errors.{error.cls_name}: ") if error is not None else said


def _asset(event: DagsterEvent) -> str:
    return (event.step_key or "").rpartition("__")[2]


def _number(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )
