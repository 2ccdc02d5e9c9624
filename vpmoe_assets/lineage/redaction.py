"""What is about to be published: a payload with a secret is refused, the files beside it lose theirs."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.contract.credentials import (
    credential_line,
    find_secret,
    known_secrets,
    redacted_lines,
    secret_values,
)
from trainer.contract.status import CHECKPOINTS_NAME, PAYLOAD_NAME
from vpmoe_assets.lineage.errors import SecretFoundError
from vpmoe_assets.lineage.record import MANIFEST_NAME

_BINARY_SAMPLE = 8192
_BLOCK = 1 << 20
_REMEDY = (
    "nothing was published. Take it out of what this was made from, pass it in an environment variable, "
    "and make this again"
)


def redact_files(root: Path, scratch: Path) -> tuple[list[str], list[str]]:
    """Remove credentials from the text files below `root`, line by line, and binary files that hold one.

    As strict as `find_credential`: a log that mentions a token keeps its wording. A file with a NUL byte near
    its beginning is no text, cannot be rewritten, and is taken away where a known secret stands in it (a run
    file of Weights & Biases, an archive of logs); resume checkpoints hold tensors and are not searched. Nor
    are links.

    Args:
        root: Directory to search.
        scratch: Directory on the same file system, for a file that is being rewritten.

    Returns:
        Paths relative to `root`, sorted: of the files that were rewritten, and of those that were removed.
    """
    secrets = secret_values()
    changed, removed = [], []
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        name = path.relative_to(root).as_posix()
        if _is_binary(path):
            if not name.startswith(f"{CHECKPOINTS_NAME}/") and _holds(path, secrets):
                path.unlink()
                removed.append(name)
        elif any(safe != line for line, safe in _lines(path, secrets)):
            safer = scratch / "redacted.tmp"
            with safer.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.writelines(safe for _, safe in _lines(path, secrets))
            shutil.copystat(path, safer)
            safer.replace(path)
            changed.append(name)
    return changed, removed


def refuse_in_content(staged: Path, what: str) -> None:
    """Refuse a payload or manifest that holds a secret: they are hashed, and nobody may alter them.

    In a payload the known secrets of this user count, since data may speak of anything, and files up to 1
    MiB, which is where settings, cards and reports are; in a manifest, which says where data came from, the
    shapes of credentials too.

    Args:
        staged: Directory in the published layout.
        what: Named in messages.

    Raises:
        SecretFoundError: One does; says which file, and whose secret.
    """
    known = known_secrets()
    for path in sorted((staged / PAYLOAD_NAME).rglob("*")):
        if not path.is_file() or path.is_symlink() or path.stat().st_size > _BLOCK:
            continue
        if found := find_secret(path.read_bytes(), known, tokens=False):
            name = path.relative_to(staged).as_posix()
            raise SecretFoundError(f"{what}: {name} holds {found[0]}; {_REMEDY}")
    manifest = staged / MANIFEST_NAME
    if manifest.is_file():
        text = manifest.read_text(encoding="utf-8", errors="replace")
        if line := credential_line(text, tuple(known)):
            raise SecretFoundError(f"{what}: {MANIFEST_NAME}, line {line}: holds a credential; {_REMEDY}")


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_BINARY_SAMPLE)


def _lines(path: Path, secrets: Sequence[str]) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from redacted_lines(file, secrets)


def _holds(path: Path, secrets: Sequence[str]) -> bool:
    """Whether a known secret stands in a file of any size."""
    if not secrets:
        return False
    encoded = [secret.encode(errors="surrogateescape") for secret in secrets]
    any_of_them, overlap = re.compile(b"|".join(map(re.escape, encoded))), max(map(len, encoded))
    with path.open("rb") as file:
        before = b""
        while block := file.read(_BLOCK):
            if any_of_them.search(before + block):
                return True
            before = (before + block)[-overlap:]
    return False
