"""How a Python process is made to import the project from one directory and from nowhere else."""

import os
from collections.abc import Mapping
from pathlib import Path

from trainer.contract.sources import SOURCES_ENV

_PATH = "PYTHONPATH"


def running_from(sources: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Python finds the project in `sources` first.

    `PYTHONPATH` comes before site-packages and what an editable install adds there, and is inherited by
    whatever a process starts. Its other entries stay, after `sources`, absolute as this process sees them:
    the process that is started has `sources` for its working directory, which `python -m` puts before all of
    them (and does not under `PYTHONSAFEPATH`). Its own look at where it was loaded from settles it.

    Args:
        sources: Laid out by `vpmoe_assets.codebase.snapshot`, or a checkout.
        environment: Everything else.
    """
    others = environment.get(_PATH)
    kept = [os.path.abspath(entry) for entry in others.split(os.pathsep)] if others else []
    first = os.path.abspath(sources)
    path = os.pathsep.join([first, *kept])
    return {**environment, _PATH: path, SOURCES_ENV: first}
