"""Weights & Biases beside `metrics.jsonl`: offline by default, online when asked for, or disabled.

Nothing of it ends a training. What cannot be reached, read or written costs a warning, and the run goes on
offline, or where that fails too, with `metrics.jsonl` alone.
"""

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from trainer.contract.files import replace_text
from trainer.job.metrics import Value
from trainer.job.workdir import LOGGER

Mode = Literal["offline", "online", "disabled"]


_FINISH_S = 120
"""How long a run that is over may still be sending, in seconds; `wandb sync` sends the rest."""

_STAGED_INPUTS = "wandb.sdk.launch.inputs.internal"
"""Inputs of a job of W&B Launch, which the SDK looks for when a run begins; nobody stages any here."""


class Tracker(Protocol):
    """Receives what `metrics.jsonl` receives."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Take the values of one step."""

    def close(self, *, failed: bool) -> None:
        """End the run."""


class NoTracker:
    """Keeps nothing: the mode `disabled`, and every rank but the first."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Drop the values."""

    def close(self, *, failed: bool) -> None:
        """Do nothing."""


class WandbTracker:
    """One run of the `wandb` SDK, with its files inside the work directory.

    A job that is started again goes on with the run of the same id, so the curve of an interrupted training
    is one curve; one that begins anew gets another run, because the first would drop steps that it has
    already. A run that was stopped as asked has not failed. The API key stays where the SDK looks for it (its
    environment variable or netrc); nothing here reads it.
    """

    def __init__(
        self, mode: Mode, work_dir: Path, *, project: str, name: str, run_id: str, config: Mapping[str, Any]
    ) -> None:
        import wandb

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a traceback where it cannot report
        # The SDK's own console capture would put every log line into the run a second time, and its links to
        # the newest log would leave the run's directory.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            symlink=False,
            x_disable_stats=True,
            finish_timeout=_FINISH_S,
            finish_timeout_raises=False,
        )
        self._lost = False
        self._files = work_dir / "wandb"
        with _absent(_STAGED_INPUTS):
            self._run = wandb.init(
                mode=mode,
                dir=str(work_dir),
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                config=dict(config),
                settings=settings,
            )

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Send the values of one step; after a failure, no more."""
        if self._lost:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:
            self._lost = True
            LOGGER.warning("%s; the rest of this run is in metrics.jsonl alone", _told(error))

    def close(self, *, failed: bool) -> None:
        """Finish the run, marking it failed where it was."""
        try:
            self._run.finish(exit_code=int(failed))
            # Of this run and of earlier ones that were killed: the SDK's service links its own log in the
            # user's cache from here. A run's directory is to hold files of its own alone.
            for path in self._files.rglob("*"):
                if path.is_symlink():
                    path.unlink()
        except Exception as error:
            LOGGER.warning("%s; what it has not sent is in metrics.jsonl", _told(error))


def open_tracker(
    mode: Mode,
    work_dir: Path,
    *,
    experiment: str,
    asset: str,
    fingerprint: str,
    anew: bool,
    config: Mapping[str, Any],
) -> Tracker:
    """Return the tracker a job asked for.

    Args:
        mode: `offline`, `online` or `disabled`.
        work_dir: Where the SDK puts its run directory.
        experiment: Becomes part of the project's name.
        asset: Name of the run.
        fingerprint: Gives the run its id, so that a restart finds it again.
        anew: The training begins again in a work directory where it may have begun before.
        config: Shown as the run's configuration.
    """
    if mode == "disabled":
        return NoTracker()
    run_id = _run_id(work_dir / "wandb" / "run_id", f"{experiment}/{asset}/{fingerprint}", anew=anew)

    def opened(how: Mode) -> Tracker:
        return WandbTracker(
            how, work_dir, project=f"vpmoe-{experiment}", name=asset, run_id=run_id, config=config
        )

    try:
        return opened(mode)
    except Exception as error:
        # The SDK reads its variables, netrc and the home directory in every mode.
        LOGGER.warning("%s; going on offline, without what the environment says of it", _told(error))
    try:
        with _by_itself(work_dir / "wandb"):
            return opened("offline")
    except Exception as error:
        LOGGER.warning(
            '%s; this run is in metrics.jsonl alone (execution.wandb = "disabled" says nothing)', _told(error)
        )
        return NoTracker()


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Let a module that was not imported pass for one that is not there, for the block.

    What imports W&B Launch gets on without it, and that import takes longer than all else of a run's begin.
    """
    if module in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[module] = None  # the import system's word for it
    try:
        yield
    finally:
        del modules[module]


@contextlib.contextmanager
def _by_itself(home: Path) -> Iterator[None]:
    """Have the SDK begin anew, and see neither variables of its own nor a home that is not there."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()  # its service holds the run that could not begin
    before = dict(os.environ)
    for name in before:
        if name.startswith("WANDB_") or name == "NETRC":
            del os.environ[name]
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(home)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _told(error: Exception) -> str:
    return f"Weights & Biases: {type(error).__name__}: {' '.join(str(error).split())}"


def _run_id(path: Path, training: str, *, anew: bool) -> str:
    """Return the id of the run that this start belongs to, and keep it for the next start.

    Args:
        path: Where it is kept.
        training: What is trained; decides the first id.
        anew: Give another id than the one that is kept, which decides it.
    """
    kept = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    if kept is not None and not anew:
        return kept
    text = training if kept is None else f"{training}/{kept}"
    run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    path.parent.mkdir(exist_ok=True)
    replace_text(path, run_id + "\n")
    return run_id
