"""Facts of sources, remembered on disk by content: parsing them all takes a second, reading them none."""

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_text
from trainer.contract.json_text import parse_json
from vpmoe_assets.codebase.facts import Facts, facts_of

_LOGGER = logging.getLogger(__name__)


class FactsMemory:
    """Facts by the content of a file.

    It is only ever a shortcut: what cannot be read or written is found out again, and what other code found
    out is not believed.

    Args:
        path: File on disk, or None.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Facts] = dict(_stored(path)) if path is not None else {}
        self._grown = False

    def facts(self, source: bytes, path: str) -> Facts:
        """Return the facts of a source file.

        Raises:
            SourceError: It is Python that does not parse.
        """
        # The path says which language it is, and what its relative imports start from.
        key = hashlib.sha256(path.encode() + b"\0" + source).hexdigest()
        if key not in self._known:
            self._known[key] = facts_of(source, path)
            self._grown = True
        return self._known[key]

    def save(self) -> None:
        """Write what was found out since, beside what another process wrote meanwhile."""
        if self._path is None or not self._grown:
            return
        known = dict(_stored(self._path)) | self._known
        document = {
            "finder": _finder(),
            "facts": {key: facts.to_json() for key, facts in list(known.items())[-_MOST:]},
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, json.dumps(document, separators=(",", ":")), durable=False)
        except OSError as error:
            _LOGGER.debug("facts of the sources are not kept: %s", error)
        self._grown = False


_MOST = 4000
"""Sources that are remembered: a dozen states of the project."""


def _stored(path: Path) -> Mapping[str, Facts]:
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        if document["finder"] == _finder():
            return {key: Facts.from_json(fields) for key, fields in document["facts"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOGGER.debug("facts of the sources are found out again: %s", error)
    return {}


@cache
def _finder() -> str:
    """Return the digest of the code that finds facts: what other code found out may be wrong."""
    digest = hashlib.sha256()
    for name in ("facts.py", "syntax.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
