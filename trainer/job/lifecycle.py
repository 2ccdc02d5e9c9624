"""What every job has in common: log, heartbeat, STATUS, a polite stop, an exit code. Free of torch."""

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from trainer.contract.credentials import without_credentials
from trainer.contract.log_records import install as keep_logs_clean
from trainer.contract.schema.job import Job
from trainer.contract.status import DONE, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, INTERRUPTED, RUNNING
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir


class Interrupted(Exception):  # noqa: N818 - a stop that was asked for is no error
    """The job stopped because it was asked to, at a point from which it goes on when it is started again."""


class JobError(RuntimeError):
    """The job cannot go on and the message says all there is to say: no traceback is shown."""


Work = Callable[[Job, WorkDir, StopRequest], None]


def run_job(job: Job, work: Work) -> int:
    """Run a job from start to exit code.

    The first heartbeat and the signal handlers are there before the work imports anything heavy.

    Args:
        job: The job.
        work: Does it; raises `Interrupted` when it stopped as asked.

    Returns:
        0 when the deliverable is complete, 75 when interrupted (start the same job again), 1 when failed:
        also by an exception that is no `Exception`, as torch's `CheckpointException` is.

    Raises:
        KeyboardInterrupt, SystemExit, GeneratorExit: As raised; STATUS says `failed` by then.
    """
    keep_logs_clean()
    directory = WorkDir(Path(job.work_dir), rank=int(os.environ.get("RANK", "0")))
    stop = StopRequest()
    with (
        warnings.catch_warnings(),
        stop.listening(),
        directory.logging(),
        directory.heartbeat(),
    ):
        # What is said at import about Transformer Engine and Apex, and on each load about a single process.
        warnings.filterwarnings(
            "ignore", category=UserWarning, module=r"megatron\.|torch\.distributed\.checkpoint"
        )
        directory.status(RUNNING)
        try:
            work(job, directory, stop)
        except Interrupted as pause:
            LOGGER.warning("%s", pause)
            directory.status(INTERRUPTED)
            return EXIT_INTERRUPTED
        except BaseException as error:  # whatever ends a job, STATUS must not stay `running`
            if isinstance(error, ValueError | JobError | OSError):
                LOGGER.error("%s", error)
                LOGGER.debug("%s", traceback.format_exc())
            else:
                LOGGER.error("%s", traceback.format_exc())
            directory.fail(without_credentials(f"{type(error).__name__}: {error}"))
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            return EXIT_FAILED
        directory.status(DONE)
        return EXIT_DONE
