"""What surrounds a run here, against what surrounded it when a record was made: packages, Python, machine."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.packages import edited_files, installed_packages, plain_name
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.project import ROOT

_OURSELVES = "vpmoe"
_PROGRAM = (
    "import json, platform; from vpmoe_assets.lineage.packages import edited_files, installed_packages; "
    "print(json.dumps([platform.python_version(), list(installed_packages()), edited_files()]))"
)
"""Run by another environment's Python; these modules need nothing but the standard library."""
_TIME_LIMIT_S = 60


@dataclass(frozen=True)
class Surroundings:
    """An environment that jobs may run in.

    Attributes:
        python: Path of its interpreter.
        version: Of Python.
        packages: `{name, version, record_sha256}` of every installed distribution.
        edited: Files that are not what was installed, by the name of their distribution.
    """

    python: Path
    version: str
    packages: tuple[Mapping[str, str | None], ...]
    edited: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def here(cls) -> "Surroundings":
        """Return that of this process."""
        return cls(Path(sys.executable), platform.python_version(), installed_packages(), edited_files())

    @classmethod
    def of(cls, directory: Path) -> "Surroundings":
        """Return that of a virtual environment.

        Raises:
            ProvenanceError: There is no Python in it, or one that cannot say what is installed.
        """
        python = directory.absolute() / "bin" / "python"
        if not python.is_file():
            raise ProvenanceError(f"--env {directory} is no virtual environment: there is no {python}")
        try:
            done = subprocess.run(
                [python, "-c", _PROGRAM],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=_TIME_LIMIT_S,
            )
            version, packages, edited = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise ProvenanceError(
                f"{python} does not say what is installed: {said.strip()[-300:]}"
            ) from error
        return cls(python, str(version), tuple(packages), edited)

    def differences(self, record: Record, recorded: Iterable[Mapping[str, str | None]]) -> list[str]:
        """Say what is installed here otherwise than when a record was made.

        Args:
            record: What was made.
            recorded: The list of packages that it names.
        """
        found: list[str] = []
        if (stated := record.environment.get("python")) not in (None, self.version):
            found.append(f"Python {stated} → {self.version}")
        now, before = _versions(self.packages), _versions(recorded)
        for name in sorted(before.keys() - {_OURSELVES}):
            if now.get(name) != before[name]:
                found.append(f"{name} {before[name]} → {now.get(name) or '(absent)'}")
            elif edited := self.edited.get(name):
                more = f" and {len(edited) - 3} more" if len(edited) > 3 else ""
                found.append(f"{name} {before[name]}, edited since: {', '.join(edited[:3])}{more}")
        return found

    def remarks(self, record: Record, recorded: Iterable[Mapping[str, str | None]]) -> list[str]:
        """Say what else is different here and refuses nothing: more packages, another machine."""
        recorded = list(recorded)
        found: list[str] = []
        if more := sorted(_versions(self.packages).keys() - _versions(recorded).keys() - {_OURSELVES}):
            named = ", ".join(more[:5]) + (f" and {len(more) - 5} more" if len(more) > 5 else "")
            found.append(f"installed here and not then: {named}")
        from vpmoe_assets.lineage.provenance import environment

        present = environment()
        for name in ("cpu", "cpu_count", "gpus", "driver", "cuda"):
            old, new = record.environment.get(name), present.get(name)
            if old != new and name in record.environment:
                found.append(f"{name} {_shown(old)} → {_shown(new)}: floating-point sums may round otherwise")
        return found


def _versions(packages: Iterable[Mapping[str, str | None]]) -> dict[str, str | None]:
    return {plain_name(str(each["name"])): each["version"] for each in packages}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return (
            ", ".join(str(each.get("name", each)) if isinstance(each, dict) else str(each) for each in value)
            or "none"
        )
    return "none" if value is None else str(value)
