"""What is installed: every distribution with its version, and the hash of the list of its files."""

import base64
import csv
import hashlib
import os
import re
from collections.abc import Iterator
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
        header = _header(distribution)
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
        found.setdefault(plain_name(name), entry)
    return tuple(found[name] for name in sorted(found))


def _header(distribution: metadata.Distribution) -> dict[str, str]:
    """Return name and version; `distribution.metadata` parses the long description, too, at each use."""
    said = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return dict(_FIELD.findall(said.partition("\n\n")[0]))


def plain_name(name: str) -> str:
    """Return the name of a distribution as all its spellings have it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def edited_files() -> dict[str, list[str]]:
    """Return the installed files that are not what their distribution's `RECORD` says, by its name.

    Read are those of another size, and those that were written to after the installation had ended, which
    writes `RECORD` last. Left out are those that it gives no hash of, such as bytecode, commands, and what
    stands in `.dist-info`, which the installer writes for each environment.
    """
    found: dict[str, list[str]] = {}
    for distribution in metadata.distributions():
        name, root = _header(distribution).get("Name"), Path(str(distribution.locate_file("")))
        listed = distribution.read_text("RECORD")
        if not name or not listed or root.name == _VENDORED or plain_name(name) in found:
            continue
        if edited := sorted(_edited(root, listed)):
            found[plain_name(name)] = edited
    return found


def _edited(root: Path, listed: str) -> Iterator[str]:
    rows = [row for row in csv.reader(listed.splitlines()) if len(row) == 3]
    own = next((path for path, _, _ in rows if path.endswith(".dist-info/RECORD")), None)
    installed = os.stat(root / own).st_mtime_ns if own is not None else 0
    for path, stated, size in rows:
        if not stated.startswith("sha256=") or path.startswith("..") or ".dist-info/" in path:
            continue
        try:
            status = os.stat(f"{root}/{path}")
        except OSError:
            yield path
            continue
        if (size and int(size) != status.st_size) or status.st_mtime_ns > installed:
            with open(f"{root}/{path}", "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != stated.removeprefix("sha256="):
                yield path
