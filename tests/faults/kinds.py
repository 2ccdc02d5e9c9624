"""Kinds of faults: each disturbs the making of an asset, and leaves the site to whoever starts again."""

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults import teacher
from tests.faults.experiment import NAME
from tests.faults.mounts import leave_room, let_go, lock_up, move_to_disk
from tests.faults.site import Lab, Program, Site
from tests.resources.launched import carrying
from trainer.contract.status import CHECKPOINTS_NAME
from vpmoe_assets.lineage.record import RECORD_NAME

TRAINED = ("vpdense_80_healed", "vpmoe_stage1", "vpmoe_stage2", "vpmoe_stage3")
JOBS = ("vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe", *TRAINED, "teacher_topk", "eval_vpmoe_stage1")
POOLED = ("synth_harmony", "synth_kd_v1")
QUICK = ("synth", "healing_corpus", "core8_bundle", "healing_text_v1", "ladder_report")
ANY = (*JOBS, *POOLED, *QUICK)
_SOON_S = 0.02
_SERVERS_S = 60.0


@dataclass
class Fault:
    """One fault that is being made.

    Attributes:
        site: Where.
        asset: Whose making is disturbed.
        seconds: That it takes undisturbed.
        draw: Chance.
    """

    site: Site
    asset: str
    seconds: float
    draw: random.Random

    @property
    def lab(self) -> Lab:
        return self.site.lab

    @property
    def work(self) -> Path:
        """The asset's work area, wherever its fingerprint leads; a path that is not there before it is."""
        found = [*(self.site.root / "artifacts" / ".work" / NAME).glob(f"{self.asset}-*")]
        return found[0] if found else self.site.root / "not-yet"

    def moment(self) -> float:
        return self.draw.uniform(0.1, 1.1) * self.seconds

    def until(self, program: Program, there: Callable[[], object], seconds: float = 120.0) -> bool:
        """Wait until something is there, while a program runs."""
        end = time.monotonic() + seconds
        while program.poll() is None and time.monotonic() < end:
            if there():
                return True
            time.sleep(_SOON_S)
        return False


Kind = Callable[[Fault], str]
MISSED = ("nobody was there", "it had just ended", "there was none", "no job", ", 0 refused", "were enough")
"""What a kind says where its moment did not come: the run was undisturbed."""


def _kill(victims: list[psutil.Process], draw: random.Random, number: signal.Signals = signal.SIGKILL) -> str:
    if not victims:
        return "nobody was there"
    victim = draw.choice(victims)
    with contextlib.suppress(psutil.NoSuchProcess):
        name = victim.name()
        victim.send_signal(number)
        return f"{number.name} to {name}"
    return "it had just ended"


# Killed.


def killed_orchestrator(fault: Fault) -> str:
    program = fault.site.materialize(fault.asset)
    moment = fault.moment()
    if program.within(moment) is None:
        os.kill(program.pid, signal.SIGKILL)
    return f"after {moment:.2f} s: exit {program.wait()}"


def killed_rank(fault: Fault) -> str:
    program = fault.site.materialize(fault.asset)
    fault.until(program, lambda: fault.lab.programs("trainer"))
    moment = fault.draw.uniform(0.0, 0.8) * fault.seconds
    program.within(moment)
    done = _kill(fault.lab.programs("trainer"), fault.draw)
    return f"{moment:.2f} s into the job: {done}, exit {program.wait()}"


def killed_worker(fault: Fault) -> str:
    def workers() -> list[psutil.Process]:
        return [each for each in psutil.Process(program.pid).children() if _is_worker(each)]

    program = fault.site.materialize(fault.asset)
    fault.until(program, workers)
    moment = fault.draw.uniform(0.0, 0.4) * fault.seconds
    program.within(moment)
    done = _kill(workers() if program.poll() is None else [], fault.draw)
    return f"{moment:.2f} s into the build: {done}, exit {program.wait()}"


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "vpmoe_assets.harmony.pool" in process.cmdline()
    return False


def killed_step_process(fault: Fault) -> str:
    """The process that the orchestrator started: here it hands signals on to the rank, or is torchrun."""
    program = fault.site.materialize(fault.asset)
    if not fault.until(program, lambda: fault.lab.programs("trainer")):
        return f"no job: exit {program.wait()}"
    program.within(fault.draw.uniform(0.0, 0.6) * fault.seconds)
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = [each for each in psutil.Process(program.pid).children() if "trainer" in each.cmdline()]
    done = _kill(children, fault.draw)
    return f"{done}, exit {program.wait()}"


def killed_twice(fault: Fault) -> str:
    first = killed_orchestrator(fault)
    second = killed_rank(fault) if fault.asset in JOBS else killed_orchestrator(fault)
    return f"{first}; then {second}"


def interrupted(fault: Fault) -> str:
    program = fault.site.materialize(fault.asset)
    moment, number = fault.moment(), fault.draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    if program.within(moment) is None:
        os.kill(program.pid, number)
    return f"{number.name} after {moment:.2f} s: exit {program.wait()}"


def stalled(fault: Fault) -> str:
    """A rank is stopped for longer than a job may be silent."""
    program = fault.site.materialize(fault.asset, stall_timeout_s=7.0, grace_s=2.0)
    fault.until(program, lambda: fault.lab.programs("trainer"))
    program.within(fault.draw.uniform(0.0, 0.6) * fault.seconds)
    done = _kill(fault.lab.programs("trainer"), fault.draw, signal.SIGSTOP)
    return f"{done}, exit {program.wait()}"


def killed_daemon(fault: Fault) -> str:
    """The daemon that launches queued runs; another takes its place, and the run goes to its end."""
    site, command = fault.site, ("run", "-m", "vpmoe_assets.definitions")
    daemon = site.start("dagster._daemon", *command)
    job = ("job", "launch", "-m", "vpmoe_assets.definitions", "-j", "data")
    launched = site.start("dagster", *job)
    if launched.wait() != 0:
        return f"WRONG: {launched.said()[-500:]}"
    moment = fault.draw.uniform(0.0, 3.0) * fault.seconds
    daemon.within(moment)
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    after = site.start("dagster._daemon", *command)
    with site.instance() as instance:
        newest = instance.get_runs(limit=1)[0].run_id
        fault.until(after, lambda: instance.get_run_by_id(newest).is_finished, seconds=200.0)
        status = instance.get_run_by_id(newest).status.value
    os.kill(after.pid, signal.SIGTERM)
    after.wait()
    end = time.monotonic() + _SERVERS_S
    while (fault.lab.programs() or carrying(fault.lab.id)) and time.monotonic() < end:
        time.sleep(0.5)  # code servers end when they miss the heartbeat of who started them
    return f"{moment:.2f} s after the launch; the run: {status}"


# Disks and clocks.

WRITES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "record": (f"*{RECORD_NAME}*", ANY),
    "ledger": ("*/.records/*", ANY),
    "payload": ("*/.work/*payload*", ANY),
    "index": ("*index.duckdb*", ANY),
    "checkpoint": (f"*/{CHECKPOINTS_NAME}/*", TRAINED),
    "statement": ("*/.statements/*", ANY),
    "metrics": ("*/metrics.jsonl", TRAINED),
    "log": ("*/log.txt", JOBS),
    "console": ("*/console.txt", JOBS),
    "heartbeat": ("*heartbeat*", JOBS),
    "status": ("*STATUS*", JOBS),
    "job": ("*job.json*", JOBS),
    "object": ("*/.objects/*", ANY),
    "work": ("*/.work/*", ANY),
    "events": ("*/.dagster/*", ANY),
    "everything": ("*/artifacts/*", ANY),
}
"""What cannot be written, and for which assets there is such a thing."""
ONCE = ("record", "ledger", "job")
"""Of these, what is written once or twice."""


def full(what: str) -> Kind:
    """Return the kind where the disk is full for files of one sort."""

    def disturbed(fault: Fault) -> str:
        spare = fault.draw.choice((0, 0, 0, 1) if what in ONCE else (0, 0, 0, 1, 1, 2, 3, 8))
        fault.lab.disturber.refuse(WRITES[what][0].replace("*/artifacts", f"{fault.site.root}*"), spare=spare)
        program = fault.site.materialize(fault.asset, grace_s=5.0)
        code = program.wait()
        return f"after {spare} writes, {fault.lab.disturber.hits} refused: exit {code}"

    return disturbed


def read_only(fault: Fault) -> str:
    """Nothing in the store can be written, from the start or from some moment on."""
    pattern = f"{fault.site.root}/artifacts/*"
    moment = fault.draw.choice((0.0, fault.moment()))
    if moment == 0.0:
        fault.lab.disturber.refuse(pattern, error=errno.EROFS)
    program = fault.site.materialize(fault.asset, grace_s=5.0)
    if moment > 0.0:
        program.within(moment)
        fault.lab.disturber.refuse(pattern, error=errno.EROFS)
    code = program.wait()
    return f"from {moment:.2f} s on, {fault.lab.disturber.hits} refused: exit {code}"


def small_disk(fault: Fault) -> str:
    """The store is on a disk of its own, which is soon full; then it grows."""
    room = 1 << fault.draw.randrange(10, 26 if fault.asset in JOBS else 17)
    store = fault.site.root / "artifacts"
    move_to_disk(store)
    leave_room(store, room)
    code = fault.site.materialize(fault.asset, grace_s=5.0).wait()
    leave_room(store, None)
    return f"{room} bytes free{' were enough' if code == 0 else ''}: exit {code}"


def mounted_read_only(fault: Fault) -> str:
    """The store is mounted read-only, from the start or from some moment on, and then no more."""
    moment = fault.draw.choice((0.0, fault.moment()))
    store = fault.site.root / "artifacts"
    if moment == 0.0:
        lock_up(store)
    program = fault.site.materialize(fault.asset, grace_s=5.0)
    if moment > 0.0:
        if program.within(moment) is not None:
            return "it had just ended"
        lock_up(store)
    code = program.wait()
    let_go(fault.site.root)
    return f"from {moment:.2f} s on: exit {code}"


def clock(fault: Fault) -> str:
    """The time of day jumps while it is made, mostly back; sometimes it is killed besides, and once more."""
    jump = fault.draw.choice((-7200.0, -86400.0, -30.0, -7200.0, 7200.0))
    program = fault.site.materialize(fault.asset)
    program.within(fault.moment())
    fault.lab.disturber.set_clock(jump)
    if fault.draw.random() < 0.5 and program.poll() is None:
        os.kill(program.pid, signal.SIGKILL)
    first = program.wait()
    again = fault.site.materialize(fault.asset).wait()  # while it is still wrong
    return f"{jump:+g} s: exit {first}, then {again}"


# More than one.


def two_runs(fault: Fault) -> str:
    first = fault.site.materialize(fault.asset)
    time.sleep(fault.draw.uniform(0.0, 0.5) * fault.seconds)
    second = fault.site.materialize(fault.asset)
    codes = first.wait(), second.wait()
    waited = "is held by" in first.said() + second.said()  # a minute, on a busy machine
    if codes != (0, 0) and not waited:
        return f"WRONG: exits {codes}: {first.said()[-800:]}{second.said()[-800:]}"
    return "both ended well"


def two_writers(fault: Fault) -> str:
    """While it is made, the index is made again, over and over."""
    program, times = fault.site.materialize(fault.asset), 0
    while program.poll() is None:
        done = fault.site.vpmoe("index", "rebuild")
        if done.wait() != 0:
            return f"WRONG: index rebuild: {done.said()[-500:]}"
        times += 1
    return f"{times} rebuilds: exit {program.wait()}"


# Damage.


def _flip(path: Path, draw: random.Random) -> str:
    """Change one byte of a file, which gets an inode of its own: its links are other sites' files."""
    content, mode = bytearray(path.read_bytes()), path.stat().st_mode
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)
    return f"byte {place} of {path.name}"


def _cut(path: Path, draw: random.Random) -> str:
    content, mode = path.read_bytes(), path.stat().st_mode
    size = draw.randrange(len(content))
    path.unlink()
    path.write_bytes(content[:size])
    path.chmod(mode)
    return f"{path.name} cut to {size} of {len(content)} bytes"


def corrupt_checkpoint(fault: Fault) -> str:
    program = fault.site.materialize(fault.asset)
    fault.until(program, lambda: any((fault.work / CHECKPOINTS_NAME).glob("iter_*")))
    program.within(fault.draw.uniform(0.0, 0.3))
    for process in fault.lab.programs("trainer"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    code = program.wait()
    files = [path for path in (fault.work / CHECKPOINTS_NAME).glob("iter_*/**/*") if path.is_file()]
    if not files:
        return f"there was none: exit {code}"
    return f"exit {code}; {fault.draw.choice((_flip, _cut))(fault.draw.choice(files), fault.draw)}"


def _inputs(fault: Fault) -> list[Path]:
    """Return the directories of what the asset is made from, by an undisturbed run's record."""
    record = fault.lab.before("finished").store.find(NAME, fault.asset)
    assert record is not None
    named = [fault.site.store.find(NAME, each.asset) for each in record.inputs]
    return [fault.site.store.directory(each) for each in named if each is not None]


def corrupt_input(fault: Fault) -> str:
    files = [path for each in _inputs(fault) for path in (each / "payload").rglob("*") if path.stat().st_size]
    path = fault.draw.choice([path for path in files if path.is_file()])
    done = fault.draw.choice((_flip, _cut))(path, fault.draw)
    program = fault.site.materialize(fault.asset)
    return f"{path.parts[-4]}: {done}: exit {program.wait()}"


def half_record(fault: Fault) -> str:
    path = fault.draw.choice(_inputs(fault)) / RECORD_NAME
    done = _cut(path, fault.draw)
    program = fault.site.materialize(fault.asset)
    return f"{path.parts[-3]}: {done}: exit {program.wait()}"


def corrupt_object(fault: Fault) -> str:
    path = fault.draw.choice(sorted((fault.site.root / "artifacts" / ".objects").iterdir()))
    done = fault.draw.choice((_flip, _cut))(path, fault.draw)
    program = fault.site.materialize(fault.asset)
    return f"{done[:60]}: exit {program.wait()}"


def corrupt_index(fault: Fault) -> str:
    path = fault.site.root / "artifacts" / "index.duckdb"
    done = fault.draw.choice((_flip, _cut))(path, fault.draw)
    program = fault.site.materialize(fault.asset)
    return f"{done}: exit {program.wait()}"


# A teacher.


def bad_teacher(fault: Fault) -> str:
    how, after = fault.draw.choice(teacher.FAULTS), fault.draw.choice((0, 1, 3, 6))
    fault.lab.oracle.misbehave(how, after)
    program = fault.site.materialize(fault.asset)
    code = program.within(45.0)
    if code is None:
        os.kill(program.pid, signal.SIGTERM)
        code = program.wait()
    return f"{how} after {after} answers: exit {code}"


KINDS: Mapping[str, tuple[Kind, tuple[str, ...]]] = {
    "orchestrator killed": (killed_orchestrator, ANY),
    "rank killed": (killed_rank, JOBS),
    "data worker killed": (killed_worker, POOLED),
    "step process killed": (killed_step_process, JOBS),
    "killed twice": (killed_twice, ANY),
    "interrupted": (interrupted, ANY),
    "daemon killed": (killed_daemon, ("synth_harmony",)),
    "stopped": (stalled, (*TRAINED, "teacher_topk")),
    **{f"full: {what}": (full(what), assets) for what, (_, assets) in WRITES.items()},
    "read-only store": (read_only, ANY),
    "small disk": (small_disk, ANY),
    "mounted read-only": (mounted_read_only, ANY),
    "clock jumps": (clock, ANY),
    "two runs at once": (two_runs, ANY),
    "two writers of the index": (two_writers, ANY),
    "checkpoint corrupt": (corrupt_checkpoint, TRAINED),
    "input corrupt": (corrupt_input, (*JOBS, *POOLED)),
    "object corrupt": (corrupt_object, ANY),
    "index corrupt": (corrupt_index, ANY),
    "record half written": (half_record, (*JOBS, *POOLED)),
    "teacher dies or lies": (bad_teacher, ("teacher_topk", "vpmoe_stage3")),
}
"""What disturbs, and whose making it can disturb."""
MOUNTING = ("small disk", "mounted read-only")
"""Kinds for which the system's mounts change."""
