"""What is installed: every distribution with its version, and the hash of the list of its files."""

import hashlib
import re
from functools import cache
from importlib import metadata
from pathlib import Path

_VENDORED = "_vendor"
"""Directory of packages that another one brings along for itself, on the path once that was imported; their
files stand in its own `RECORD`."""

_FIELD = re.compile(r"^(Name|Version): *(.*?)\s*$", re.MULTILINE)
"""Of the header of a distribution's metadata; neither ever goes on in a second line."""


@cache
def installed_packages() -> tuple[dict[str, str | None], ...]:
    """Return `{name, version, record_sha256}` of every installed distribution, by name; found out once.

    `record_sha256` is the sha256 of its `RECORD`, which holds a sha256 of each installed file; null where
    the installer wrote none. Of two distributions of one name the one counts that Python would import.
    """
    found: dict[str, dict[str, str | None]] = {}
    for distribution in metadata.distributions():
        # `distribution.metadata` parses the whole file, long description and all, at each use.
        said = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        header = dict(_FIELD.findall(said.partition("\n\n")[0]))
        name, version = header.get("Name"), header.get("Version")
        if not name:  # what an installer left behind when it was interrupted; nothing can be imported by it
            continue
        if Path(str(distribution.locate_file(""))).name == _VENDORED:
            continue
        files = distribution.read_text("RECORD")
        entry = {
            "name": name,
            "version": version,
            "record_sha256": None if files is None else hashlib.sha256(files.encode()).hexdigest(),
        }
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), entry)
    return tuple(found[name] for name in sorted(found))
