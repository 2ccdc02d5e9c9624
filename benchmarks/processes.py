"""Processes of a benchmark, each with torch and a device of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.multiprocessing as multiprocessing


def run_apart(
    target: Callable[..., None], calls: Sequence[tuple[Any, ...]], *, side_by_side: bool = False
) -> None:
    """Run a function once for each set of arguments, each time in a fresh process.

    Args:
        target: The function, of a module.
        calls: Arguments of each call.
        side_by_side: All at once; by default one after the other, with all cores for each.

    Raises:
        SystemExit: A process failed.
    """
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=target, args=arguments) for arguments in calls]
    for group in [jobs] if side_by_side else [[job] for job in jobs]:
        for job in group:
            job.start()
        for job in group:
            job.join()
            if job.exitcode:
                raise SystemExit(f"a process ended with {job.exitcode}; its traceback is above")
