"""Every parser for many hostile inputs: `python -m tests.hostile [--examples N] [--minutes M] [--parser P]`.

What came of every thousand of them is appended to the results, a JSON line each, so a sitting may end at any
time: the next goes on, and gives again what broke. The table of all results is printed at the end; `--table`
prints it alone.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis.reporting import with_reporter

from tests.hostile.judging import judge
from tests.hostile.parsers import PARSERS, Parser
from tests.sittings import ROOT, add, commit, latest, read

RESULTS = ROOT / "benchmarks" / "hostile.jsonl"
PART = ("parser", "seed")
PORTION = 1000
"""Inputs of one process and one seed."""
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


def portions(examples: int) -> Iterator[tuple[int, int]]:
    """Yield seeds, and how many inputs each makes."""
    for seed, first in enumerate(range(0, examples, PORTION)):
        yield seed, min(PORTION, examples - first)


def table(results: list[dict[str, Any]]) -> str:
    """Return results by parser; the last word about a seed holds."""
    lines = [f"{'parser':24} {'examples':>8} {'seconds':>8} {'peak MiB':>9}  outcome"]
    for parser in PARSERS:
        found = [each for (name, _), each in latest(results, *PART).items() if name == parser.name]
        held = sum(each["examples"] for each in found if not each["wrong"])
        seconds = sum(each["seconds"] for each in found)
        peak = max((each["peak_bytes"] for each in found), default=0) / 2**20
        outcome = next(
            (each["wrong"] for each in found if each["wrong"]), "held" if found else "not yet tried"
        )
        lines.append(f"{parser.name:24} {held:8} {seconds:8.1f} {peak:9.1f}  {outcome}")
    return "\n".join(lines)


def main() -> int:
    """Run what was asked for, and print the table."""
    reading = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.splitlines()[0])
    reading.add_argument("--examples", type=int, default=10_000, help="of each parser, over all sittings")
    reading.add_argument("--minutes", type=float, default=1e9, help="begin no thousand after so many")
    reading.add_argument("--parser", action="append", help="a part of a name; all of them by default")
    reading.add_argument("--results", type=Path, default=RESULTS)
    reading.add_argument("--table", action="store_true", help="print the table of the results alone")
    asked = reading.parse_args()
    begun, left = time.monotonic(), 0
    for parser in () if asked.table else PARSERS:
        if asked.parser and not any(part in parser.name for part in asked.parser):
            continue
        known = latest(read(asked.results), *PART)
        for seed, examples in portions(asked.examples):
            last = known.get((parser.name, seed))
            if last and not last["wrong"] and last["examples"] >= examples:
                continue
            if time.monotonic() - begun > asked.minutes * 60:
                left += examples
                continue
            said, seconds, peak = run(parser, examples, seed)
            wrong = said.strip().splitlines()[-1] if said else ""
            key = {"parser": parser.name, "seed": seed, "examples": examples, "commit": commit()}
            add(asked.results, {**key, "seconds": round(seconds, 1), "peak_bytes": peak, "wrong": wrong})
            if said:
                print(f"{parser.name}, seed {seed}: {said}", file=sys.stderr, flush=True)
    results = read(asked.results)
    print(table(results))
    if left:
        print(f"{left} inputs are left to the next sitting")
    return int(any(each["wrong"] for each in latest(results, *PART).values()))


if __name__ == "__main__":
    sys.exit(main())
