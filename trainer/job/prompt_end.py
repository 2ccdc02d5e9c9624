"""A process that has done all its work ends at once."""

import atexit
import contextlib
import os
import sys


class PromptEnd:
    """Ends the process when its exit code is known, after everything else that is to be done at exit.

    What `atexit` knows of runs last registered first, so this one is made first. It leaves out what the
    interpreter would do after that: take apart the modules that were loaded, half a second for torch and
    Megatron. Without a code (an exception ends the process, or `SystemExit`) the interpreter goes on itself.

    Attributes:
        code: Exit code of the process; None while it is not known.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.code is None:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more: that has been said
                stream.flush()
        os._exit(self.code)
