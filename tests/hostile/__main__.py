"""Every parser for many hostile inputs: `python -m tests.hostile --examples 10000`.

Each parser runs in a process of its own, whose address space is limited: a header that claims 2^60 bytes, and
is believed, ends in a `MemoryError`, which no parser may raise. The peak is what the process has taken beyond
what it had when the parser began.
"""

import argparse
import os
import re
import resource
import sys
import time
import traceback

from hypothesis.reporting import with_reporter

from tests.hostile.judging import judge
from tests.hostile.parsers import PARSERS, Parser

MORE_BYTES = 2 << 30
"""How much more address space a parser may take than the program has."""


def run(parser: Parser, examples: int, number: int) -> tuple[str, float, int]:
    """Run a parser in a process of its own.

    Args:
        parser: Which.
        examples: How many inputs it gets.
        number: Seed of the inputs.

    Returns:
        What came of it (empty if nothing broke), seconds, and bytes at the peak.
    """
    began = time.monotonic()
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        _limit()
        said, before = "", 0
        try:
            parser.inputs()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with with_reporter(lambda text: None):
                judge(parser, examples, number)
        except BaseException as error:
            said = f"{_last(traceback.format_exc())}{type(error).__name__}: {str(error)[:200]!r}"
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(send, f"{more * 1024} {said[-8000:]}".encode("utf-8", "backslashreplace"))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        told = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    more, _, said = told.partition(" ")
    if status or not told:
        said = f"the process ended with status {status}"
    return said, time.monotonic() - began, int(more or 0)


def _last(trace: str) -> str:
    """Return the lines of a traceback that name code of this project."""
    found = re.findall(r'File "\S*/((?:trainer|vpmoe_assets|tests)/\S+)", line (\d+)', trace)
    return "".join(f"{file}:{line}\n" for file, line in found[-12:])


def _limit() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_BYTES, now + MORE_BYTES))


def main() -> None:
    """Run what was asked for, and print the table."""
    reading = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    reading.add_argument("--examples", type=int, default=10_000)
    reading.add_argument("--seed", type=int, default=0)
    reading.add_argument("--parser", action="append", help="a part of a name; all of them by default")
    asked = reading.parse_args()
    broken = 0
    print(f"{'parser':24} {'examples':>8} {'seconds':>8} {'peak MiB':>9}  outcome", flush=True)
    for parser in PARSERS:
        if asked.parser and not any(part in parser.name for part in asked.parser):
            continue
        said, seconds, peak = run(parser, asked.examples, asked.seed)
        outcome = said.strip().splitlines()[-1] if said else "held"
        print(
            f"{parser.name:24} {asked.examples:8} {seconds:8.1f} {peak / 2**20:9.1f}  {outcome}", flush=True
        )
        if said:
            broken += 1
            print(said, file=sys.stderr, flush=True)
    raise SystemExit(min(broken, 1))


if __name__ == "__main__":
    main()
