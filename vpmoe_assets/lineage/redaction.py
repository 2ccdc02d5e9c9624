"""Secrets stay out of records and logs: command lines, environment, metadata of checks, any text.

Three nets: names that mean a secret (`--token X`, `API_KEY=X`), the shapes of well-known credentials,
and the values of the environment's own secret variables wherever they turn up.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"

_WORDS = (
    r"(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|auth)"
)
# Whole words only: `tokenizer`, `max_tokens`, `author` and `total_tokens` are no secrets, and neither are the
# special tokens of a vocabulary.
_SECRET_NAME = re.compile(rf"(?:^|[_\-.]){_WORDS}(?:$|[_\-.])", re.IGNORECASE)
_VOCABULARY = re.compile(
    r"(?:bos|eos|eod|eot|pad|unk|mask|sep|cls|start|end|special|next|per|first|last)[_-]token", re.IGNORECASE
)
_INLINE = re.compile(
    rf"(?P<name>[A-Za-z0-9_.\-]*{_WORDS})(?P<sep>[\"']?\s*=\s*[\"']?|[\"']?\s*:\s*[\"']?(?=[^\s\"'&,;]{{8}}))"
    r"(?P<value>[^\s\"'&,;]+)",
    re.IGNORECASE,
)
_SHAPES = (
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*://)[^/\s@]+@"), rf"\1{REDACTED}@"),  # scheme://user:password@host
    (
        re.compile(r"\b(Bearer|Basic)\s+(?=\S*[0-9=])[A-Za-z0-9+/=._\-]{16,}", re.IGNORECASE),
        rf"\1 {REDACTED}",
    ),
    (
        re.compile(
            r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abpr]-|wandb_v1_)[A-Za-z0-9_\-]{12,}"
        ),
        REDACTED,
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), REDACTED),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        REDACTED,
    ),
)
_BINARY_SAMPLE = 8192
_SHORTEST_SECRET = 8
"""Shorter values of secret variables are not searched for: they would blot out ordinary words."""


def is_secret_name(name: str) -> bool:
    """Say whether a variable, option or key of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None and _VOCABULARY.search(name) is None


def secret_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the values of the environment's secret variables, longest first."""
    environ = os.environ if environ is None else environ
    values = {v for k, v in environ.items() if is_secret_name(k) and len(v) >= _SHORTEST_SECRET}
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def find_secret(content: bytes, environ: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Return the name of a secret variable whose value stands in `content`, and in which line, or None."""
    for name, value in sorted((os.environ if environ is None else environ).items()):
        if is_secret_name(name) and len(value) >= _SHORTEST_SECRET:
            at = content.find(os.fsencode(value))
            if at >= 0:
                return name, content.count(b"\n", 0, at) + 1
    return None


def redact_text(text: str, secrets: Sequence[str] = ()) -> str:
    """Return `text` with every secret that one of the nets catches replaced by `[redacted]`."""
    return _INLINE.sub(_hide_value, _without_credentials(text, secrets))


def redact_command(argv: Sequence[str], secrets: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return a command line without its secrets, both as `--token=X` and as `--token X`."""
    secrets = secret_values() if secrets is None else secrets
    safe: list[str] = []
    hide_next = False
    for word in argv:
        if hide_next and not word.startswith("--"):
            safe.append(REDACTED)
            hide_next = False
            continue
        hide_next = word.startswith("-") and "=" not in word and is_secret_name(word.lstrip("-"))
        safe.append(redact_text(word, secrets))
    return tuple(safe)


def redact(obj: Any, secrets: Sequence[str] | None = None) -> Any:
    """Return a copy of nested dicts and lists with secrets removed from strings and under secret keys."""
    secrets = secret_values() if secrets is None else secrets
    if isinstance(obj, str):
        return redact_text(obj, secrets)
    if isinstance(obj, dict):
        return {
            key: REDACTED
            if value and isinstance(value, str) and is_secret_name(key)
            else redact(value, secrets)
            for key, value in obj.items()
        }
    if isinstance(obj, list | tuple):
        return [redact(value, secrets) for value in obj]
    return obj


def find_credential(obj: Any, secrets: Sequence[str] | None = None, path: str = "$") -> str | None:
    """Return the key path of the first string that holds a credential, or None.

    Stricter than `redact`, for values that must not be changed: only real secrets of the environment
    and the shapes of credentials count, not a prose that mentions a password.
    """
    secrets = secret_values() if secrets is None else secrets
    if isinstance(obj, str):
        return path if _without_credentials(obj, secrets) != obj else None
    children: list[tuple[str, Any]] = []
    if isinstance(obj, dict):
        children = [(f"{path}.{key}", value) for key, value in obj.items()]
    elif isinstance(obj, list | tuple):
        children = [(f"{path}[{position}]", value) for position, value in enumerate(obj)]
    return next((hit for where, value in children if (hit := find_credential(value, secrets, where))), None)


def redact_files(root: Path, scratch: Path) -> list[str]:
    """Remove credentials from the text files below `root`, line by line, and return the names of those.

    As strict as `find_credential`: a log that mentions a token keeps its wording. Files with a NUL byte
    near their beginning are no text (checkpoints, index files) and are not searched; nor are links.

    Args:
        root: Directory to search.
        scratch: Directory on the same file system, for a file that is being rewritten.

    Returns:
        Paths relative to `root`, sorted.
    """
    secrets = secret_values()
    changed = []
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        if any(safe != line for line, safe in _redacted_lines(path, secrets)):
            safer = scratch / "redacted.tmp"
            with safer.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.writelines(safe for _, safe in _redacted_lines(path, secrets))
            shutil.copystat(path, safer)
            safer.replace(path)
            changed.append(path.relative_to(root).as_posix())
    return changed


def _redacted_lines(path: Path, secrets: Sequence[str]) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        if b"\0" in file.read(_BINARY_SAMPLE):
            return
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        for line in file:
            yield line, _without_credentials(line, secrets)


def _without_credentials(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def _hide_value(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"].lstrip("-")):
        return match[0]
    return f"{match['name']}{match['sep']}{REDACTED}"
