"""What a job leaves for whoever watches it: exit codes, the words of `STATUS`, and the names of its files.

```
work_dir/
  job.json        what is to be done, written by whoever starts the job
  STATUS          one line: running | done | interrupted | failed: <reason>
  heartbeat       one JSON object; the file is rewritten every few seconds, also inside a long save
  metrics.jsonl   one JSON object per logged step
  log.txt         the log of rank 0; other ranks write log.rank_NNNNN.txt
  console.txt     standard output and error of all ranks, where a launcher keeps them
  checkpoints/    resume checkpoints, iter_0000123 and the like
  rollouts/       the rounds of an on-policy run, round_0000123.safetensors and the like
  attempts.jsonl  when each start of the job began and how it ended; see `trainer.contract.attempts`
  .tasks/         what an evaluation has finished of one checkpoint
output_dir/
  payload/        the deliverable
  modules.json    the project's modules that rank 0 had loaded by then
  summary.json    what is said of the payload; written last
```
"""

JOB_NAME = "job.json"
STATUS_NAME = "STATUS"
HEARTBEAT_NAME = "heartbeat"
METRICS_NAME = "metrics.jsonl"
LOG_NAME = "log.txt"
CONSOLE_NAME = "console.txt"
CHECKPOINTS_NAME = "checkpoints"
ROLLOUTS_NAME = "rollouts"
ATTEMPTS_NAME = "attempts.jsonl"
TASKS_NAME = ".tasks"
PAYLOAD_NAME = "payload"
MODULES_NAME = "modules.json"
SUMMARY_NAME = "summary.json"

RUNNING = "running"
DONE = "done"
INTERRUPTED = "interrupted"
FAILED = "failed"

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 75
"""`EX_TEMPFAIL` of sysexits.h: nothing is wrong, run the same command again and it goes on."""


def status_line(state: str, reason: str = "") -> str:
    """Return the one line of `STATUS`; a reason of several lines is flattened."""
    return " ".join(f"{state}: {reason}".split() if reason else state.split()) + "\n"


def parse_status(text: str) -> tuple[str, str]:
    """Return state and reason of a `STATUS`, such as ("failed", "loss is NaN at step 3"); empty if it is."""
    state, _, reason = text.partition(":")
    return state.strip(), reason.strip()
