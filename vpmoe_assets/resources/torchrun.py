"""torchrun with a shutdown time-out that a checkpoint fits into.

`python -m vpmoe_assets.resources.torchrun --shutdown-timeout SECONDS -- TORCHRUN-ARGUMENT ...`

torchrun passes SIGINT and SIGTERM on to its ranks and kills them when they are still there after 30 seconds;
the same when one rank ended before the others. A rank may need longer to write its checkpoint. The 30 seconds
are the default of one method, which is replaced here; torch 2.13 has an option besides, which covers the
signals alone and not the rank that ended first (pytorch issue 119856), so where it exists it is given too.
"""

import argparse
import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vpmoe_assets.resources.bound import PARENT_ENV

OPTION = "--shutdown-timeout"


class ShutdownTimeoutError(RuntimeError):
    """This torch offers no way to wait for a checkpoint before ranks are killed."""


def with_shutdown_timeout(close: Callable[..., None], seconds: int) -> Callable[..., None]:
    """Return the `PContext.close` of torch elastic with another default for its time-out.

    Args:
        close: `close(self, death_sig=None, timeout=30)`.
        seconds: The time-out where the caller names none; torchrun never names one.

    Raises:
        ShutdownTimeoutError: The method has no parameter `timeout` with a default.
    """
    parameter = inspect.signature(close).parameters.get("timeout")
    if parameter is None or parameter.default is inspect.Parameter.empty:
        raise ShutdownTimeoutError(
            f"torch {importlib.metadata.version('torch')}: PContext.close{inspect.signature(close)} has no "
            "default time-out that could be lengthened: torchrun would kill ranks while they write a "
            "checkpoint. Install the torch of requirements.lock, or run with nproc = 1."
        )

    @functools.wraps(close)
    def longer(self: Any, death_sig: Any = None, timeout: float = seconds) -> None:
        close(self, death_sig, timeout)

    return longer


def main(arguments: Sequence[str]) -> None:
    """Run torchrun in this process; ends with its exit code.

    Args:
        arguments: `--shutdown-timeout SECONDS -- TORCHRUN-ARGUMENT ...`.
    """
    split = arguments.index("--")
    parser = argparse.ArgumentParser(prog="torchrun")
    parser.add_argument(OPTION, type=int, required=True)
    seconds: int = parser.parse_args(arguments[:split]).shutdown_timeout
    rest = list(arguments[split + 1 :])
    # The ranks are bound to this process, not to the one that started it.
    os.environ[PARENT_ENV] = str(os.getpid())

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import PContext

    longer = with_shutdown_timeout(PContext.close, seconds)
    PContext.close = longer  # type: ignore[method-assign]
    if any(OPTION in action.option_strings for action in run.get_args_parser()._actions):
        rest = [f"{OPTION}={seconds}", *rest]
    run.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
