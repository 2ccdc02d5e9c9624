"""Where one checkpoint of an evaluation is measured, and its part of the deliverable.

```
work_dir/
  .tasks/           what is finished of it, for the next start
  attempts.jsonl    when measuring it began and ended
  log.txt           what was said meanwhile
output_dir/
  payload/          <checkpoint>.json and <checkpoint>.items.jsonl: what was measured and nothing else
  <checkpoint>.json the report in the envelope of this run
  summary.json      written last
```
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.contract.attempts import KILLED, attempt, end_attempt
from trainer.contract.canonical import canonical_json
from trainer.contract.files import replace_text
from trainer.contract.schema.job import Part
from trainer.contract.status import ATTEMPTS_NAME, LOG_NAME, PAYLOAD_NAME, SUMMARY_NAME, TASKS_NAME
from trainer.evaluate.report import Report, write_report
from trainer.job.deliverable import WRITING_NAME, write_summary
from trainer.job.lifecycle import Interrupted
from trainer.job.workdir import logged_to


class Measurement:
    """One checkpoint's part of a job.

    Attributes:
        name: The checkpoint.
        part: Its identity and its directories.
        tasks: Where finished tasks are kept.
    """

    def __init__(self, name: str, part: Part) -> None:
        self.name, self.part = name, part
        self.work, self.output = Path(part.work_dir), Path(part.output_dir)
        self.tasks = self.work / TASKS_NAME

    @contextmanager
    def at_work(self, sources: str | None) -> Iterator[None]:
        """Log to the checkpoint's own file and note when measuring it begins and ends.

        Args:
            sources: sha256 of the snapshot that the job runs from.
        """
        for directory in (self.work, self.output):
            directory.mkdir(parents=True, exist_ok=True)
        noted, log = self.work / ATTEMPTS_NAME, self.work / LOG_NAME
        if log.is_file():
            end_attempt(noted, KILLED, at_unix_s=log.stat().st_mtime)
        with logged_to(log), attempt(noted, sources=sources, stops=(Interrupted,)):
            yield

    def write(self, report: Report, envelope: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the deliverable: the payload whole, and the summary last."""
        scratch, payload = self.output / WRITING_NAME, self.output / PAYLOAD_NAME
        (self.output / SUMMARY_NAME).unlink(missing_ok=True)
        for left in (scratch, payload):
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        write_report(report, scratch)
        scratch.rename(payload)
        replace_text(self.output / f"{self.name}.json", canonical_json(envelope, indent=1) + "\n")
        write_summary(self.output, summary)
