"""Make one artifact again from its record, in a store of its own, and say what came of it.

The code is that of the record's snapshot, laid out in a directory of its own and run from there by Dagster's
own command, so that also a record of another version of this program is made by the program that made it.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe_assets.codebase.running import running_from
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.adoption import is_adopted, origin
from vpmoe_assets.lineage.difference import Difference
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.kept import keep_sources, laid_out
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.outcome import FileChange, StepChange, first_file, first_step
from vpmoe_assets.lineage.own_store import OwnStore
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.statements import PROGRAM, Statement
from vpmoe_assets.lineage.store import Store

_REPEATED = re.compile(r"OMP_|MKL_|CUBLAS_|TORCH|PYTORCH_|NVTE_|NCCL_|PYTHONHASHSEED")
"""Variables that can change a result and mean the same wherever a job runs."""
_ENDING_S = 660.0
"""How long an interrupted run is waited for: it writes a checkpoint."""
_FAILED = re.compile(r"dagster\.\S*Failure: (?:dagster\.\S*Failure: )?|(?:Error|Exception): ")


class RerunError(LineageError):
    """An artifact cannot be made again, or the run failed; the message says why and what to do."""


@dataclass(frozen=True)
class Present:
    """What present code and experiment put in the place of the record's own.

    Attributes:
        tree: The sources.
        experiment: The experiment's TOML, as written.
    """

    tree: SourceTree
    experiment: str


@dataclass(frozen=True)
class Outcome:
    """What came of making an artifact again.

    Attributes:
        record: As it had been made.
        made: Made again, in a store of its own.
        identity: What differs between the two fingerprints beside the inputs; nothing where they are equal.
        step: First step whose metrics differ, of a training.
        file: First file that differs.
        seconds: How long it took.
        failed: Blocking checks that what was made did not pass, by name.
    """

    record: Record
    made: Record
    identity: Difference
    step: StepChange | None
    file: FileChange | None
    seconds: float
    failed: tuple[str, ...] = ()

    @property
    def reproduced(self) -> bool:
        """Whether it came out the same, to the last byte of the payload."""
        return self.made.digest == self.record.digest

    @property
    def same_identity(self) -> bool:
        """Whether it was made by the same recipe, code, packages and inputs."""
        return self.made.fingerprint == self.record.fingerprint

    def difference(self) -> dict[str, Any]:
        """Return what differs as plain values."""
        return {
            "identity": self.identity.to_json() if self.identity else None,
            "step": self.step and self.step.to_dict(),
            "file": self.file and self.file.to_dict(),
        }


def original_of(store: Store, record: Record) -> Record:
    """Return the record of the run that made an artifact's files: its own, or that which it repeats.

    Raises:
        RerunError: It repeats another one whose record is nowhere any more.
    """
    if record.original is None:
        return record
    found = store.ledger.get(record.original.record_digest)
    if found is None:
        raise RerunError(
            f"{version_name(record)} repeats {version_name(record.original)}, whose record is neither in the "
            "store nor in its ledger: there is nothing to make it again from"
        )
    return found


def kept_packages(store: Store, record: Record) -> list[dict[str, str | None]]:
    """Return the packages that were installed when an artifact was made.

    Raises:
        RerunError: They were not kept, and neither were the sources.
        ObjectMissing: The list is not in the store; `ObjectDamaged` where it is not what its name says.
    """
    kept = record.objects
    if is_adopted(record):
        raise RerunError(f"{version_name(record)} cannot be made again: {origin(record)}; nobody knows how")
    if kept.sources is None or kept.packages is None or kept.experiment is None:
        raise RerunError(
            f"{version_name(record)} cannot be made again from its record: its sources, experiment or "
            "packages were not kept when it was made; materialise it with present code, and what is made "
            "then can be"
        )
    listed: list[dict[str, str | None]] = ObjectStore(store.root).get_json(kept.packages)
    return listed


def rerun(
    store: Store,
    record: Record,
    own: OwnStore,
    *,
    python: Path,
    present: Present | None,
    log: Callable[[str], None],
) -> Outcome:
    """Make an artifact again and compare what comes out with what is recorded.

    Args:
        store: With its inputs and objects.
        record: Of the run that made it.
        own: Where it is made.
        python: Interpreter of the environment.
        present: Code and experiment in the place of the record's own; None for those.
        log: Told what is going on.

    Raises:
        LineageError: An input or an object is missing or damaged, or the run failed.
    """
    sources = _prepare(store, record, own, present, log)
    began = time.monotonic()
    failed: tuple[str, ...] = ()
    try:
        _run(own, record, sources, python, _configuration(store, record))
    except RerunError:
        # A blocking check fails the run of an artifact that is there, and what came out says more than that.
        there = own.store.find(record.experiment, record.asset)
        failed = () if there is None else tuple(each.check for each in own.store.blocked_by(there))
        if not failed:
            raise
    made = own.store.find(record.experiment, record.asset)
    if made is None:
        raise RerunError(f"the run published no {record.asset}; {own.log} says why")
    changed = made.digest != record.digest
    old, new = store.directory(record), own.store.directory(made)
    return Outcome(
        record,
        made,
        Difference.between(record.fingerprint_payload, made.fingerprint_payload),
        first_step(old / "run", new / "run") if changed else None,
        first_file(record, old / "payload", made, new / "payload"),
        time.monotonic() - began,
        failed,
    )


def state(store: Store, outcome: Outcome, environment: list[str]) -> Statement | None:
    """State what came of it, about the record, where it was made by the record's own identity.

    Args:
        store: Of the record.
        outcome: What came of it.
        environment: What was installed otherwise.
    """
    if not outcome.same_identity:
        return None
    body: dict[str, Any] = {
        "fingerprint": outcome.made.fingerprint,
        "digest": outcome.made.digest,
        "by": "vpmoe rerun",
        "by_record": outcome.made.record_digest,
        "environment": environment,
        "host": outcome.made.environment.get("host"),
    }
    if outcome.reproduced:
        return store.statements.append(Statement.about(outcome.record, "reproduced", body, author=PROGRAM))
    body["difference"] = outcome.difference()
    return store.statements.append(Statement.about(outcome.record, "not_reproduced", body, author=PROGRAM))


def _prepare(
    store: Store, record: Record, own: OwnStore, present: Present | None, log: Callable[[str], None]
) -> Path:
    """Fill a store with what the run needs, and return the directory that it runs from."""
    kept, objects = record.objects, ObjectStore(store.root)
    assert kept.sources is not None
    assert kept.experiment is not None
    if present is None:
        sha256 = own.objects.put(objects.get(kept.sources), "the archive of the sources")
        own.experiment.write_bytes(objects.get(kept.experiment))
    else:
        sha256 = keep_sources(own.objects, present.tree)
        own.experiment.write_text(present.experiment, encoding="utf-8")
    own.take_inputs(store, record, log)
    return laid_out(own.objects, sha256)


def _configuration(store: Store, record: Record) -> dict[str, Any]:
    """Return the run configuration of the trainer, as it was; W&B is told nothing a second time."""
    kept: Mapping[str, Any] = {}
    if record.objects.run_config is not None:
        kept = ObjectStore(store.root).get_json(record.objects.run_config)
    trainer = dict(((kept.get("resources") or {}).get("trainer") or {}).get("config") or {})
    return {"resources": {"trainer": {"config": {**trainer, "wandb": "disabled"}}}}


def _run(
    own: OwnStore, record: Record, sources: Path, python: Path, configuration: Mapping[str, Any]
) -> None:
    command = [
        os.fspath(python),
        *("-m", "dagster", "asset", "materialize", "-m", "vpmoe_assets.definitions"),
        *("--select", f"{record.experiment}/{record.asset}"),
        *("--config-json", json.dumps(configuration)),
    ]
    with own.log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=sources,
            env=_environment(own, record, sources),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code:
        raise RerunError(f"the run failed: {_last_words(own.log)}. Its log is {own.log}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Interrupt a run, which writes a checkpoint; end it where it does not go."""
    for sent, wait_s in ((signal.SIGINT, _ENDING_S), (signal.SIGTERM, 30.0), (signal.SIGKILL, 30.0)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sent)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue


def _environment(own: OwnStore, record: Record, sources: Path) -> dict[str, str]:
    """Return the environment of the run: what can change a result as it was, nothing of Dagster's here."""
    recorded: Mapping[str, str] = record.environment.get("variables") or {}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _REPEATED.match(name) and not name.startswith("DAGSTER_")
    }
    ours = {
        "DAGSTER_HOME": os.fspath(own.home.absolute()),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "VPMOE_ARTIFACTS": os.fspath(own.root.absolute()),
        "VPMOE_EXPERIMENT": os.fspath(own.experiment.absolute()),
        "VPMOE_GIT_SHA": record.code.git_sha,
        "VPMOE_GIT_DIRTY": "1" if record.code.git_dirty else "0",
    }
    repeated = {name: value for name, value in recorded.items() if _REPEATED.match(name)}
    return running_from(sources, {**kept, **repeated, **ours})


def _last_words(log: Path) -> str:
    """Return what a run said last of why it failed."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if found := _FAILED.search(line):
            return line[found.start() :].strip()[:500].rstrip(".")
    return (lines[-1].strip()[:500] if lines else "it said nothing").rstrip(".")
