"""What is kept of a step beside its artifact, so that the record alone is enough to repeat it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from trainer.contract.credentials import credential_line, find_credential, known_secrets, secret_values
from vpmoe_assets.codebase.snapshot import lay_out
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.errors import SecretFoundError
from vpmoe_assets.lineage.objects import ObjectStore, refuse_secrets
from vpmoe_assets.lineage.packages import installed_packages
from vpmoe_assets.lineage.provenance import Code
from vpmoe_assets.lineage.record import Objects

_SOURCES = Path(".work", ".sources")
_free_of: WeakKeyDictionary[SourceTree, dict[str, str]] = WeakKeyDictionary()
"""The secrets that a reading of the sources was searched for and did not hold; its bytes stay the same."""


def keep(
    objects: ObjectStore,
    tree: SourceTree,
    code: Code,
    *,
    experiment: str,
    resolved: Mapping[str, Any],
    run_config: Mapping[str, Any],
    run_id: str,
) -> Objects:
    """Keep what a step is made with, and return the objects by which its record names it.

    Args:
        objects: Where.
        tree: The sources that it runs.
        code: What is said of them.
        experiment: TOML of the experiment, as written; empty where it was written nowhere.
        resolved: The experiment with every default written out.
        run_config: Dagster's.
        run_id: Of the Dagster run, for messages.

    Raises:
        SecretFoundError: A file holds a secret of this user's or a token, or one of the configurations a
            credential; says which, and where.
    """
    secrets = secret_values()
    _refuse_credentials(experiment, "the experiment's TOML", secrets)
    if where := find_credential(_plain(run_config), secrets):
        raise SecretFoundError(
            f"the run configuration holds a credential at {where}; pass it in an environment variable, and "
            f"take this run out of Dagster's history: dagster run delete {run_id}"
        )
    return Objects(
        sources=keep_sources(objects, tree),
        experiment=objects.put(experiment.encode(), "the experiment's TOML") if experiment else None,
        resolved_experiment=objects.put_json(_plain(resolved), "the experiment"),
        run_config=objects.put_json(_plain(run_config), "the run configuration"),
        packages=objects.put_json(installed_packages(), "the list of packages"),
        patch=None if code.patch is None else objects.put(code.patch, "the patch of the sources"),
    )


def keep_sources(objects: ObjectStore, tree: SourceTree) -> str:
    """Keep the sources as they were read, and return the sha256 of their archive."""
    known = known_secrets()
    if _free_of.get(tree) != known:
        for path, content in tree.content.items():
            refuse_secrets(content, path, known)
            if path.endswith(".toml"):
                _refuse_credentials(content.decode("utf-8", "replace"), path, tuple(known))
        _free_of[tree] = known
    return objects.put(tree.archive, "the archive of the sources")


def _refuse_credentials(text: str, what: str, secrets: Sequence[str]) -> None:
    """Refuse a text of settings, its comments too, with anything that has the shape of a credential."""
    if line := credential_line(text, secrets):
        raise SecretFoundError(
            f"{what}, line {line}: holds a credential; pass credentials in environment variables"
        )


def laid_out(objects: ObjectStore, sources: str) -> Path:
    """Return a directory that holds kept sources, and nothing else, for programs to run from.

    It is shared by all that run from these sources, and compared with the object each time.

    Args:
        objects: Where they are kept.
        sources: sha256 of their archive.

    Raises:
        ObjectMissing: The object is not there.
        ObjectDamaged: It is not what its name says.
    """
    directory = objects.root / _SOURCES / sources
    lay_out(objects.get(sources), directory)
    return directory


def _plain(value: Mapping[str, Any]) -> Any:
    """Return a mapping as plain JSON values; Dagster's are of classes of its own."""
    return json.loads(json.dumps(value, default=_plainly))


def _plainly(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
