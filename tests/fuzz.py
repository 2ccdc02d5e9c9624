"""The command line under values that nobody would give: every option of every verb and command registered.

A process that has imported the commands forks for each call. A call has a directory, a home and a store to
throw away, and a time limit; what is wrong with how it ended is said in a line.

    python -m tests.fuzz COUNT [SEED]
"""

import argparse
import atexit
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import click

from tests.verbs import ALSO, GIVEN, SERVES, VERBS
from trainer.__main__ import build_parser
from trainer.__main__ import main as trainer_main
from trainer.contract.pipe import quiet_when_unread
from trainer.contract.printed import print_whatever_comes
from vpmoe_assets.cli import main as vpmoe_main

LIMIT_S = 30
SANDBOX = "sandbox"
VALUES = (
    "", " ", "-", "--", "-1", "0", "1", "2", "1.5", "1e-9", "nan", "inf", "-inf", "1e309", "9" * 30,
    "9" * 5000, "0x10", "١٢", "ä≠😀", "\udcff\udcfe", "a\nb", "a\tb\x1b[31m", "'\"`$(x)", "%s{0}{x}", "\\",
    "*", "**/*", "[", "~", "x" * 300, "x" * 5000, "a/" * 3000, "@", "/@", "synth", "smoke/synth", "synth@1",
    "nonesuch", "full", "smoke", "SELECT 1", "SELECT * FROM latest", "SELECT", ".", "..", "missing",
    "missing/file", "directory", "empty", "text.toml", "good.toml", "broken.json", "object.json",
    "rows.parquet", "broken.parquet", "checkpoint", "link", "dangling", "loop", "n\udcffme", "artifacts",
    "artifacts/index.duckdb", "artifacts/smoke/synth", "http://127.0.0.1:9/", "s3://x/y", "cpu", "cuda",
    "high", "True", "null", "{}", "[]",
)  # fmt: skip
"""Of options and arguments; the paths are of the sandbox, and none leaves it."""
SURROUNDINGS: tuple[dict[str, str], ...] = (
    {},
    {"COLUMNS": "0"},
    {"COLUMNS": "1", "TERM": "dumb", "NO_COLOR": "1"},
    {"COLUMNS": "x", "LINES": "-1"},
    {"VPMOE_EXPERIMENT": "nonesuch"},
    {"VPMOE_EXPERIMENT": "ä\udcff\n"},
    {"VPMOE_EXPERIMENT": "directory"},
    {"VPMOE_EXPERIMENT": "text.toml"},
    {"VPMOE_ARTIFACTS": "text.toml"},
    {"VPMOE_ARTIFACTS": "missing"},
    {"VPMOE_ARTIFACTS": "loop"},
    {"VPMOE_ARTIFACTS": "text.toml/x"},
    {"OMP_NUM_THREADS": "abc", "CUDA_VISIBLE_DEVICES": "x", "RANK": "x", "WORLD_SIZE": ""},
    {"HF_HUB_DOWNLOAD_TIMEOUT": "abc", "WANDB_MODE": "x", "NETRC": "directory"},
    {"DAGSTER_HOME": "missing"},
    {"TMPDIR": "missing"},
    {"HOME": "missing"},
)


CACHES = ("artifacts/.work/steps.json",)
"""What was found out about the project, for the next call; not about the one that was refused."""


@dataclass(frozen=True)
class Option:
    """An option or an argument of a command.

    Attributes:
        flags: Its words; none of an argument.
        takes: Whether it takes a value.
        required: Whether the command needs it.
        sane: Values that it may well be given.
    """

    flags: tuple[str, ...]
    takes: bool
    required: bool
    sane: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """One verb of `vpmoe`, or one command of the trainer."""

    words: tuple[str, ...]
    options: tuple[Option, ...]
    run: Callable[[list[str]], object]


@dataclass(frozen=True)
class Call:
    """One call."""

    command: Command
    arguments: tuple[str, ...]
    surroundings: dict[str, str]
    encoding: str

    def __str__(self) -> str:
        shown = [each if len(each) < 40 else f"{each[:20]}…({len(each)})" for each in self.arguments]
        return f"{' '.join(self.command.words)} {shown} {self.surroundings} {self.encoding}"


@dataclass
class Ended:
    """How calls ended."""

    codes: dict[int, int] = field(default_factory=dict)
    options: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def commands() -> list[Command]:
    """Every verb and every command, by walking the parsers."""
    found = []
    for path, verb in VERBS.items():
        options = [
            Option(
                tuple(each.opts) if isinstance(each, click.Option) else (),
                not (isinstance(each, click.Option) and each.is_flag),
                each.required,
                tuple(GIVEN.get(each.name or "", ())) or _sane(each.name or ""),
            )
            for each in verb.params
        ]
        found.append(Command(("vpmoe", *path), (*options, _HELP), _vpmoe))
    subparsers = next(
        each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction)
    )
    for name, parser in subparsers.choices.items():
        options = [
            Option(
                tuple(each.option_strings),
                each.nargs != 0,
                each.required,
                tuple(map(str, each.choices or ())) or _sane(each.dest),
            )
            for each in parser._actions
            if each.dest != "help"
        ]
        found.append(Command(("trainer", name), (*options, _HELP), _trainer))
    return found


_HELP = Option(("--help",), False, False, ())


def _sane(name: str) -> tuple[str, ...]:
    """Return values by which a call gets further than to its first refusal."""
    return {
        "inputs": ("rows.parquet",),
        "output": ("out",),
        "config": ("smoke", "good.toml"),
        "job": ("object.json",),
        "checkpoint": ("checkpoint",),
        "teacher": ("checkpoint",),
        "data": ("directory",),
        "prompt": ("The sea",),
        "because": ("it is the same",),
        "experiment": ("smoke", "good.toml"),
        "directory": ("out",),
        "assets": ("synth",),
    }.get(name, ("1",))


def _vpmoe(arguments: list[str]) -> object:
    return vpmoe_main(arguments, prog_name="vpmoe")


def _trainer(arguments: list[str]) -> object:
    print_whatever_comes()
    sys.argv = ["trainer", *arguments]
    sys.exit(quiet_when_unread(trainer_main))


def calls(count: int, seed: int) -> Iterator[Call]:
    """Every option at least once with a hostile value, then whatever the dice say.

    Each call has dice of its own, so another option somewhere changes no call of the others.
    """
    single = [(command, option) for command in commands() for option in command.options]
    for number in range(count):
        command, hostile = single[number % len(single)]
        name = (*command.words, *hostile.flags) if hostile.flags else (*command.words, hostile.sane)
        chance = random.Random(f"{seed} {number // len(single)} {name}")
        arguments: list[str] = []
        for option in command.options:
            if option is hostile:
                arguments += _given(option, chance.choice(VALUES), chance)
            elif option.required or (option is not _HELP and chance.random() < 0.15):
                values = VALUES if chance.random() < 0.15 else option.sane or VALUES
                arguments += _given(option, chance.choice(values), chance)
        surroundings = chance.choice(SURROUNDINGS) if chance.random() < 0.3 else {}
        encoding = chance.choice(("utf-8", "utf-8", "ascii"))
        also = ALSO.get(command.words[1:], ()) if SERVES.intersection(command.words) else ()
        yield Call(command, (*command.words[1:], *arguments, *also), surroundings, encoding)


def _given(option: Option, value: str, chance: random.Random) -> list[str]:
    if not option.flags:
        return [value]
    flag = chance.choice(option.flags)
    if not option.takes:
        return [flag]
    return [f"{flag}={value}"] if flag.startswith("--") and chance.random() < 0.5 else [flag, value]


class Sandbox:
    """What a call may touch."""

    def __init__(self, base: Path, make: Callable[[Path], None]) -> None:
        self.template, self.place = base / "template", base / SANDBOX
        make(self.template)
        self._fresh()

    def _fresh(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.template, self.place, symlinks=True)
        self.before = self.listing()

    def listing(self) -> dict[bytes, tuple[int, int]]:
        """Every file, with its size and kind."""
        found: dict[bytes, tuple[int, int]] = {}
        for top, directories, files in os.walk(os.fsencode(self.place)):
            for name in (*directories, *files):
                path = os.path.join(top, name)
                said = os.lstat(path)
                found[path] = (said.st_mode, 0 if name in directories else said.st_size)
        return found

    def changed(self) -> list[str]:
        """Name what was made, changed or removed, and put everything back."""
        after = self.listing()
        different = sorted(
            path for path in {*after, *self.before} if after.get(path) != self.before.get(path)
        )
        if different:
            self._fresh()
        return [
            os.fsdecode(os.path.relpath(path, os.fsencode(self.place)))
            for path in different
            if not _ours(path)
        ]


def _ours(path: bytes) -> bool:
    """Whether it may stay: locks that others may hold, caches of torch and of the store."""
    return b"/.locks" in path or b"/torchinductor_" in path or b"/.work/heads.sqlite" in path


def run(call: Call, sandbox: Sandbox) -> tuple[int | None, str, str]:
    """Run one call in a fork; exit code (None: it did not end in time), standard output and error."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        if (pid := os.fork()) == 0:
            _become(call, sandbox, output.fileno(), errors.fileno())
        code: int | None = None
        until = time.monotonic() + LIMIT_S
        pause = 0.001
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        else:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):  # whatever it left running
            os.killpg(pid, signal.SIGKILL)
            return code if code is None else -1000, "", "left a process running"
        said = []
        for stream in (output, errors):
            stream.seek(0)
            said.append(stream.read().decode("utf-8", errors="surrogateescape"))
        return code, said[0], said[1]


def _become(call: Call, sandbox: Sandbox, output: int, errors: int) -> NoReturn:
    code = 99
    try:
        os.setsid()
        atexit._clear()  # what this process is to do at its end is not the call's to do
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        for number, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, io.TextIOWrapper(open(number, "wb", closefd=False), encoding=call.encoding))  # noqa: SIM115
        sys.stdin = open(0, encoding=call.encoding, closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        place = sandbox.place
        os.chdir(place / "here")
        os.environ.update(
            HOME=str(place / "home"),
            VPMOE_ARTIFACTS=str(place / "here" / "artifacts"),
            TMPDIR=str(place / "tmp"),
        )
        os.environ.update(call.surroundings)
        tempfile.tempdir = None
        gc.enable()
        call.command.run([*call.arguments])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def wrong(call: Call, code: int | None, output: str, errors: str, changed: Sequence[str]) -> list[str]:
    """Say what is wrong with how a call ended."""
    found = []
    if code is None:
        found.append(f"did not end within {LIMIT_S} s")
    elif code not in (0, 1, 2):
        found.append(f"exit code {code}: {errors[-200:]!r}")
    if "Traceback (most recent call last)" in output + errors:
        found.append("a traceback: " + " | ".join(errors.strip().splitlines()[-3:])[-400:])
    lines = errors.splitlines()
    if code == 1 and len(lines) != 1:
        found.append(f"{len(lines)} lines of refusal: {errors[:300]!r}")
    left = [path for path in changed if not path.endswith(CACHES)]
    if code in (1, 2) and left:
        found.append(f"left behind: {left[:5]}")
    if code == 0 and "--json" in call.arguments and "--help" not in call.arguments:
        try:
            json.loads(output, parse_constant=lambda word: 1 / 0)
        except (ValueError, ArithmeticError):
            found.append(f"no JSON: {output[:100]!r}")
    return found


def fuzz(count: int, seed: int, base: Path, make: Callable[[Path], None]) -> Ended:
    """Try so many calls."""
    warnings.simplefilter("ignore")
    sandbox, ended = Sandbox(base, make), Ended()
    os.environ.update(HOME=str(base), VPMOE_ARTIFACTS=str(base / "warm"), DAGSTER_HOME=str(base))
    _warm()
    gc.collect()
    gc.freeze()
    gc.disable()
    for call in calls(count, seed):
        began = time.monotonic()
        code, output, errors = run(call, sandbox)
        took = time.monotonic() - began
        changed = sandbox.changed()
        ended.codes[-1 if code is None else code] = ended.codes.get(-1 if code is None else code, 0) + 1
        words = " ".join(call.command.words)
        ended.seconds[words] = ended.seconds.get(words, 0) + took
        ended.options.update(f"{words} {each.partition('=')[0]}" for each in call.arguments)
        ended.wrong += [f"{call}: {each}" for each in wrong(call, code, output, errors, changed)]
    return ended


def make_sandbox(place: Path) -> None:
    """Make a home, a store with one artifact, and files of every kind that is no good."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.lineage.fabricate import publish
    from vpmoe_assets.lineage.index import Index
    from vpmoe_assets.lineage.store import Store
    from vpmoe_assets.project import ROOT

    here = place / "here"
    for name in ("directory", "checkpoint", "artifacts"):
        (here / name).mkdir(parents=True)
    (place / "home").mkdir()
    (place / "tmp").mkdir()
    store = Store(here / "artifacts")
    publish(store, "synth", metrics={"rows": 12})
    Index(here / "artifacts" / "index.duckdb").rebuild(store)
    (here / "empty").touch()
    (here / "text.toml").write_text("name = 1\n")
    shutil.copy(ROOT / "configs" / "smoke.toml", here / "good.toml")
    (here / "broken.json").write_bytes(b"\xef\xbb\xbf{\xff")
    (here / "object.json").write_text("{}")
    (here / "checkpoint" / "config.json").write_text("{}")
    pq.write_table(pa.table({"a": [1]}), here / "rows.parquet")
    (here / "broken.parquet").write_bytes((here / "rows.parquet").read_bytes()[:-9])
    (here / "link").symlink_to("directory")
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    Path(os.fsdecode(os.fsencode(here) + b"/n\xffme")).write_text("")


def _started(*_: object, as_json: bool = False, **__: object) -> NoReturn:
    """Stand in for the run that a verb starts."""
    sys.stdout.write("{}" if as_json else "")
    raise SystemExit(0)


def _profiled(*_: object, **__: object) -> NoReturn:
    """Stand in for the measurement, which takes half a minute."""
    sys.stdout.write("{}" if "--json" in sys.argv else "")
    sys.stdout.flush()
    os._exit(0)


def _warm() -> None:
    """Import what the verbs import when they run, so that no call does."""
    importlib.import_module("vpmoe_assets.commands.new").directory = Path  # type: ignore[attr-defined]
    click.launch = lambda *_, **__: 0  # type: ignore[assignment]
    importlib.import_module("vpmoe_assets.commands.make")._run = _started  # type: ignore[attr-defined]
    importlib.import_module("trainer.profiling.profile").profile = _profiled  # type: ignore[attr-defined]
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        for verb in (
            ["show", "--sources", "synth@now"],
            ["why", "synth"],
            ["plan", '+key:"smoke/synth"'],
            ["upgrade"],
            ["reap"],
            ["verify"],
            ["sql", "SELECT 1"],
        ):
            with contextlib.suppress(BaseException):
                vpmoe_main(verb, standalone_mode=False)
    import trainer.decoding.generation
    import trainer.evaluate.opening
    import trainer.job.startup  # noqa: F401


def main(arguments: Sequence[str]) -> None:
    """Fuzz, and print how the calls ended as JSON."""
    count, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    base = Path(tempfile.mkdtemp())
    began = time.monotonic()
    try:
        ended = fuzz(count, seed, base, make_sandbox)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    said = {**dataclasses.asdict(ended), "options": sorted(ended.options), "took": time.monotonic() - began}
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
