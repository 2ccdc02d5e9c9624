"""The object store: what records name by its hash, so that they are enough to repeat a step.

`artifacts/.objects/<sha256>` holds, one file each and whoever needs it: source snapshots, experiments, run
configurations, package lists, patches. A name is the sha256 of the content, so an object never changes, is
there once however many records name it, and is checked whenever it is read.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.canonical import canonical_json
from trainer.contract.credentials import find_credential, find_secret
from trainer.contract.files import sync
from vpmoe_assets.lineage.errors import ObjectDamaged, ObjectMissing, SecretFoundError

OBJECTS_NAME = ".objects"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ObjectStore:
    """The objects of one store.

    Args:
        root: Of the store; the directory of objects is made when first needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.directory = self.root / OBJECTS_NAME

    def path(self, sha256: str) -> Path:
        """Return where an object lies, whether it is there or not.

        Raises:
            ObjectMissing: That is no sha256, so nothing can lie there.
        """
        if not _SHA256.fullmatch(sha256):
            raise ObjectMissing(f"{sha256!r} names no object: expected 64 hex digits")
        return self.directory / sha256

    def has(self, sha256: str) -> bool:
        """Say whether an object is there; whether it is intact, `get` says."""
        return self.path(sha256).is_file()

    def get(self, sha256: str) -> bytes:
        """Return the content of an object.

        Raises:
            ObjectMissing: It is not there.
            ObjectDamaged: Its content is not what its name says.
        """
        path = self.path(sha256)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ObjectMissing(
                f"object {sha256} is not in {self.directory}; copy it from a store that has it"
            ) from None
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ObjectDamaged(
                f"{path} is damaged (its sha256 is {found}): remove it and copy it from a store that has it, "
                "or make again what names it"
            )
        return content

    def get_json(self, sha256: str) -> Any:
        """Return an object that was put with `put_json`; raises as `get` does."""
        return json.loads(self.get(sha256))

    def put(self, content: bytes, what: str) -> str:
        """Keep some bytes, and return their sha256. What is there already is not written again.

        Args:
            content: The bytes.
            what: Named in messages, such as "the patch".

        Raises:
            SecretFoundError: They hold a secret of this user's, or a token.
        """
        refuse_secrets(content, what)
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.path(sha256)
        try:
            there = path.read_bytes() == content
        except FileNotFoundError:
            there = False
        if not there:  # missing, or damaged: then it is mended
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(path, content)
        return sha256

    def put_json(self, value: Any, what: str) -> str:
        """Keep a value as canonical JSON, and return its sha256.

        Raises:
            SecretFoundError: It holds a credential; the message has the key path.
            UnstableValueError: It has no canonical form.
        """
        if where := find_credential(value):
            raise SecretFoundError(f"{what} holds a credential at {where}; {_REMEDY}")
        return self.put(canonical_json(value).encode("ascii"), what)


def refuse_secrets(content: bytes, what: str, known: Mapping[str, str] | None = None) -> None:
    """Refuse bytes that hold a known secret of this user's, or a token.

    Args:
        content: The bytes.
        what: Named in the message, with the line.
        known: From `known_secrets`, for whoever asks about many files.

    Raises:
        SecretFoundError: They do.
    """
    if found := find_secret(content, known):
        which, line = found
        raise SecretFoundError(f"{what}, line {line}: holds {which}; {_REMEDY}")


_REMEDY = "pass credentials in environment variables, and write them into no file of the project"


def _write(path: Path, content: bytes) -> None:
    """Bring a read-only file to the disk, whole or not at all; whoever else writes it writes the same."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)
