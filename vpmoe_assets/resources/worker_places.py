"""Where the workers of one job have their directories; apart, so that who only looks imports nothing else."""

from pathlib import Path

FOLDER = "workers"


def places(work_dir: Path) -> list[Path]:
    """Return the directories of the workers that a job has had, in order."""
    return sorted(path for path in (work_dir / FOLDER).glob("*") if path.is_dir())
