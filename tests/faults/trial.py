"""One fault: made, gone on from until the asset is there, and judged."""

import contextlib
import random
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.experiment import NAME
from tests.faults.judge import Judge
from tests.faults.kinds import JOBS, KINDS, MISSED, Fault
from tests.faults.site import Lab, Site

TRIES = 5
_LIGHT = 0.7
"""Share of the faults where no job runs, of those kinds that need none: they take a quarter of the time."""
_CHECKPOINT = re.compile(r"(\S*/checkpoints/iter_\d+): .*remove this checkpoint", re.DOTALL)
_DAMAGED = re.compile(rf"{NAME}/(\w+)(?: \(version \S+\))? is damaged")


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        seed: Of it alone: the same seed makes the same fault, up to what the machine's load decides.
        commit: Of the product.
        kind: Of `KINDS`.
        asset: That was disturbed.
        did: What was done.
        struck: Whether it disturbed anything: a process may have ended before it was to be killed.
        tries: How often it was made afterwards.
        seconds: That all of it took, judgement included.
        wrong: What is not as it has to be; nothing, where the product survived.
    """

    seed: int
    commit: str
    kind: str
    asset: str
    did: str
    struck: bool
    tries: int
    seconds: float
    wrong: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def trial(
    lab: Lab,
    judge: Judge,
    seconds: dict[str, float],
    seed: int,
    commit: str,
    kind: str,
    assets: Collection[str],
) -> Outcome:
    """Make a fault, and go on until the asset is there.

    Args:
        lab: With everything made undisturbed.
        judge: Of it.
        seconds: That each asset took undisturbed.
        seed: Of the fault.
        commit: Of the product.
        kind: Of the fault.
        assets: That may be disturbed.
    """
    begun = time.monotonic()
    draw = random.Random(f"{seed}: {kind}")
    asset = _drawn([each for each in KINDS[kind][1] if each in assets], draw)
    place = lab.directory / f"fault-{seed}"
    shutil.rmtree(place, ignore_errors=True)  # what stays of a fault that was not survived
    site = lab.before(asset).copy(place)
    wrong = []
    try:
        did = KINDS[kind][0](Fault(site, asset, lab.pace * seconds[asset], draw))
        if "WRONG" in did:
            wrong.append(did)
    finally:
        lab.disturber.leave()
        lab.oracle.behave()
    tries = 0
    while tries < TRIES:
        tries += 1
        program = site.materialize(asset)
        if program.wait() == 0:
            took = (time.monotonic() - program.begun) / seconds[asset]
            lab.pace = min(max((lab.pace + took) / 2, 0.2), 8.0)
            break
        remedy(site, said := program.said())
    else:
        wrong.append(f"not made in {TRIES} tries: {said[-1500:]}")
    wrong += judge.wrong(site, asset, checks=draw.random() < 0.2)
    if wrong:
        with contextlib.suppress(OSError):
            (site.root / "wrong.txt").write_text("\n".join([did, *wrong]))
    else:
        site.remove()
    took = round(time.monotonic() - begun, 1)
    struck = not any(missed in did for missed in MISSED)
    did = did.replace(str(lab.directory), "")
    return Outcome(seed, commit, kind, asset, did, struck, tries, took, wrong)


def _drawn(assets: list[str], draw: random.Random) -> str:
    heavy = [each for each in assets if each in JOBS]
    light = [each for each in assets if each not in JOBS]
    return draw.choice(light if light and (not heavy or draw.random() < _LIGHT) else heavy)


def remedy(site: Site, said: str) -> None:
    """Do what a message says: remove a damaged checkpoint and those after it, make an input again."""
    for found in _CHECKPOINT.findall(said):
        damaged = Path(found)
        for each in damaged.parent.glob("iter_*"):
            if each.name >= damaged.name:
                shutil.rmtree(each)
    for asset in dict.fromkeys(_DAMAGED.findall(said)):
        site.materialize(asset).wait()
