"""What the files in a work directory say about the job that writes them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.attempts import KILLED, Attempt, end_attempt, read_attempts
from trainer.contract.json_text import parse_json
from trainer.contract.status import (
    ATTEMPTS_NAME,
    CHECKPOINTS_NAME,
    CONSOLE_NAME,
    HEARTBEAT_NAME,
    JOB_NAME,
    LOG_NAME,
    METRICS_NAME,
    PAYLOAD_NAME,
    RUNNING,
    STATUS_NAME,
    SUMMARY_NAME,
    parse_status,
)
from vpmoe_assets.resources.tail import last_lines

_CHECKPOINT = re.compile(r"iter_(\d+)")


class OutputIncompleteError(RuntimeError):
    """The job says that it is done and its deliverable is not all there."""


@dataclass(frozen=True)
class WorkFiles:
    """The files of one job, read from outside.

    Attributes:
        work_dir: Of the job.
        output_dir: Of the job.
        in_parts: Whether it delivers part by part, so that what it has finished is kept.
    """

    work_dir: Path
    output_dir: Path
    in_parts: bool = False

    @property
    def console(self) -> Path:
        """Standard output and error of all processes."""
        return self.work_dir / CONSOLE_NAME

    @property
    def log(self) -> Path:
        """The trainer's own log."""
        return self.work_dir / LOG_NAME

    @property
    def metrics(self) -> Path:
        """One JSON object for each logged step."""
        return self.work_dir / METRICS_NAME

    def status(self) -> tuple[str, str]:
        """State and reason, such as ("failed", "loss is NaN at step 3"); empty before anything is written."""
        try:
            return parse_status((self.work_dir / STATUS_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "", ""

    @property
    def noted(self) -> Path:
        """What is noted of each start of the job."""
        return self.work_dir / ATTEMPTS_NAME

    def attempts(self) -> tuple[Attempt, ...]:
        """Return the starts of the job, the first one first."""
        return read_attempts(self.noted)

    def note_end(self) -> None:
        """Note how the last start ended, where whoever began it was killed before it could.

        The job itself may have come to an end all the same, and then `STATUS` says which; else its last
        heartbeat is the last that is known of it.
        """
        state, reason = self.status()
        ended = state not in ("", RUNNING)
        sign = self.work_dir / (STATUS_NAME if ended else HEARTBEAT_NAME)
        try:
            seen = sign.stat().st_mtime
        except FileNotFoundError:
            seen = 0.0
        said = f"{state}: {reason}" if reason else state
        end_attempt(self.noted, said if ended else KILLED, at_unix_s=seen)

    def clear_status(self) -> None:
        """Forget how the last attempt ended, so that it is not taken for the end of the next."""
        (self.work_dir / STATUS_NAME).unlink(missing_ok=True)

    @property
    def heartbeat(self) -> Path:
        """Rewritten every few seconds while the job lives."""
        return self.work_dir / HEARTBEAT_NAME

    def last_checkpoint(self) -> int | None:
        """Step of the newest complete resume checkpoint, or None."""
        found = [
            int(match.group(1))
            for entry in (self.work_dir / CHECKPOINTS_NAME).glob("iter_*")
            if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return max(found, default=None)

    def fingerprint(self) -> str | None:
        """Recipe fingerprint of the job that was last started here, or None."""
        try:
            content = parse_json((self.work_dir / JOB_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content.get("recipe_fingerprint") if isinstance(content, dict) else None

    def deliverable(self) -> dict[str, Any]:
        """`summary.json` of a finished job, after a look at what it stands for.

        Raises:
            OutputIncompleteError: The payload is empty, or the summary is missing or no JSON object.
        """
        payload = self.output_dir / PAYLOAD_NAME
        if not payload.is_dir() or not any(payload.iterdir()):
            raise OutputIncompleteError(f"the job ended well and left nothing in {payload}")
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """`summary.json` of a finished job.

        Raises:
            OutputIncompleteError: It is missing, or no JSON object.
        """
        summary = self.output_dir / SUMMARY_NAME
        try:
            content = parse_json(summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise OutputIncompleteError(
                f"the job ended well and its summary cannot be read: {summary}: {error}"
            ) from error
        if not isinstance(content, dict):
            raise OutputIncompleteError(f"{summary} holds no JSON object")
        return content

    def evidence(self, lines: int = 60) -> str:
        """Return the last lines that the processes printed: the trainer's log and any traceback."""
        return last_lines(self.console, lines) or last_lines(self.log, lines) or "(the job printed nothing)"
