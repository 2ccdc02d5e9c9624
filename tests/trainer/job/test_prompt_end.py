"""A process ends at once when its exit code is known, after all that is to be done at exit."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from trainer.job.prompt_end import PromptEnd
class Slow:
    def __del__(self):
        print("taken apart", flush=True)
end = PromptEnd()
kept = sys.modules["kept"] = Slow()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print("said", end=" ")
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("end.code = 75; sys.exit(75)", 75, "said thread\nat exit\n"),
        ("sys.exit(3)", 3, "said thread\nat exit\ntaken apart\n"),
        ("raise OSError('no')", 1, "said thread\nat exit\ntaken apart\n"),
    ],
)
def test_what_is_to_be_done_at_exit_is_done_and_nothing_is_taken_apart(end, code, said):
    done = subprocess.run([sys.executable, "-c", PROGRAM + end], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, said)
    assert ("no" in done.stderr) == (code == 1)
