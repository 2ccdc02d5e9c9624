"""Whose the rows of a data set are: its sources, their licences, and how they are cited.

Told from the manifests of the sources that a data set was made from, and from nothing else. What a licence
cannot be told of is not given one; a source on a hub is named with the page that states its terms.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.adoption import is_adopted
from vpmoe_assets.lineage.graph import ancestors
from vpmoe_assets.lineage.record import MANIFEST_NAME, Record
from vpmoe_assets.lineage.store import Store

_OWN = "https://spdx.org/licenses/Apache-2.0"
_KINDS = {
    "generated": _OWN,
    "builtin": _OWN,
    "pydoc_topics": "https://spdx.org/licenses/PSF-2.0",
}
"""Licences of rows that were written for this project, or come with Python."""
_REPOSITORIES = {"HuggingFaceFW/fineweb-edu": "https://spdx.org/licenses/ODC-By-1.0"}
"""Of those whose terms are one licence that has a name; PleIAs/SYNTH has terms by row, in `seed_license`."""


@dataclass(frozen=True)
class Origin:
    """A source.

    Attributes:
        asset: That holds it.
        version: Of the asset.
        record_digest: Of the version.
        description: What it is, in a sentence.
        license: URL of the licence, or of the page that states the terms; None where nothing is known.
        citation: How it is cited; None where it is nobody else's.
        url: Of its page, at the commit that was taken; None where it has none.
    """

    asset: str
    version: str
    record_digest: str
    description: str
    license: str | None
    citation: str | None
    url: str | None


def origins(store: Store, record: Record) -> list[Origin]:
    """Return the sources whose rows a data set has, or was made from; those of weights are none of them."""
    graph = ancestors(store, record)
    found: list[Origin] = []
    waiting, seen = deque([record.record_digest]), {record.record_digest}
    while waiting:
        digest = waiting.popleft()
        there = record if digest == record.record_digest else store.ledger.get(digest)
        if there is None or any(entry.path.endswith(".safetensors") for entry in there.files):
            continue
        found += _of(store, there)
        ahead = [edge.parent for edge in graph.parents.get(digest, ()) if edge.parent not in seen]
        waiting.extend(ahead)
        seen.update(ahead)
    return found


def _of(store: Store, record: Record) -> list[Origin]:
    """Return the source that an artifact is; nothing where it is made from others."""
    names = (record.asset, record.version, record.record_digest)
    if is_adopted(record):
        told = record.details["adopted"]
        said = f"made elsewhere, and adopted by {told['by']} from {told['from']}"
        return [Origin(*names, said, None, None, None)]
    manifest = _manifest(store, record)
    source = manifest.get("source", manifest)
    return [_origin(*names, source, manifest)] if isinstance(source, dict) and source.get("kind") else []


def _origin(
    asset: str, version: str, record_digest: str, source: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Origin:
    kind, repo, revision = source["kind"], source.get("repo"), source.get("revision")
    description = str(source.get("description") or manifest.get("description") or f"{asset}@{version}")
    if repo is None:
        return Origin(asset, version, record_digest, description, _KINDS.get(str(kind)), None, None)
    page = f"https://huggingface.co/datasets/{repo}"
    url = f"{page}/tree/{revision}" if revision else page
    citation = f"{repo}, {page}" + (f", commit {revision}" if revision else "")
    return Origin(asset, version, record_digest, description, _REPOSITORIES.get(repo, page), citation, url)


def _manifest(store: Store, record: Record) -> dict[str, Any]:
    """Return the manifest of a version, the ledger's copy where the version is gone; nothing without one."""
    if record.manifest is None:
        return {}
    paths = (store.directory(record) / MANIFEST_NAME, store.ledger.manifest(record.manifest.sha256))
    for path in paths:
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}
