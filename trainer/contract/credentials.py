"""What a secret is, and how text loses one before it leaves a process: records, logs, statements, errors.

Three nets: names that mean a secret (`--token X`, `API_KEY=X`), the shapes of well-known credentials, and
the values that this user's environment and credential files hold, wherever they turn up.

What identifies something is never altered: there a credential is looked for, and refused.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

REDACTED = "[redacted]"

_WORDS = (
    r"(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|auth)"
)
# Whole words only: `tokenizer`, `max_tokens`, `author` and `total_tokens` are no secrets, and neither are the
# special tokens of a vocabulary. PGPASSWORD and MYSQL_PWD are, and so is `accessToken`.
_SECRET_NAME = re.compile(
    rf"(?:^|[_\-.]){_WORDS}(?:$|[_\-.])|passw(?:or)?d$|passphrase$|[a-z]_pwd$"
    r"|(?-i:[a-z](?:Token|Secret|ApiKey|AccessKey|PrivateKey)$)",
    re.IGNORECASE,
)
_VOCABULARY = re.compile(
    r"(?:bos|eos|eod|eot|pad|unk|mask|sep|cls|start|end|special|next|per|first|last)[_-]token", re.IGNORECASE
)
_PLACE = re.compile(r"_(?:path|file|dir|sock|env)$", re.IGNORECASE)
"""Where a secret lies, or the variable that holds it: no secret itself."""
# Every pattern takes time linear in the length of a line, of which a file may have but one: a name begins
# where a word does, and the parts of an address or token have a longest length.
_INLINE = re.compile(
    rf"(?<![A-Za-z0-9_.\-])(?P<name>[A-Za-z0-9_.\-]*{_WORDS})(?P<sep>[\"']?\s*=\s*[\"']?|[\"']?\s*:\s*[\"']?(?=[^\s\"'&,;]{{8}}))"
    r"(?P<value>[^\s\"'&,;]+)",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(?:hf_|gh[porsu]_|npm_)[A-Za-z0-9]{12,}"
    r"|\b(?:sk-|github_pat_|glpat-|xox[abpr]-|wandb_v1_|nvapi-|pypi-)[A-Za-z0-9_\-]{12,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\beyJ[A-Za-z0-9_\-]{10,999}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}"  # a JSON Web Token
)
_TOKEN_NEEDLES = (
    *("hf_", "gho_", "ghp_", "ghs_", "ghu_", "ghr_", "npm_", "sk-", "github_pat_", "glpat-", "xox"),
    *("wandb_v1_", "nvapi-", "pypi-", "AKIA", "ASIA", "eyJ"),
)
_PEM_BEGIN = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_PEM_END = re.compile(r"-----END [A-Z ]*PRIVATE KEY-----")
# Each with what must be in a text for it to be there at all: that is found much sooner.
_SHAPES = (
    # scheme://user:password@host, the password with any sign that people forget to escape; a port is none.
    (
        ("://",),
        re.compile(
            r"([a-zA-Z][a-zA-Z0-9+.\-]{0,19}://)(?!git@)"
            r"(?:[^/\s\"'<>]{1,999}@|[^/\s\"'<>@:]{0,99}:(?!\d+(?:[/\s]|$))[^\s\"'<>@]{1,999}@)"
        ),
        rf"\1{REDACTED}@",
    ),
    # Signed addresses, such as those to which a hub forwards.
    (
        ("?", "&"),
        re.compile(
            r"([?&](?:access_token|auth_token|token|api_?key|key|sig|signature|x-amz-(?:signature|credential"
            r"|security-token)|x-goog-(?:signature|credential))=)[^\s&\"'<>#]{8,}",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    (
        ("earer", "EARER", "asic", "ASIC"),
        re.compile(r"\b(Bearer|Basic)\s+(?=\S*[0-9=])[A-Za-z0-9+/=._\-]{16,}", re.IGNORECASE),
        rf"\1 {REDACTED}",
    ),
    (_TOKEN_NEEDLES, _TOKEN, REDACTED),
    (("-----BEGIN",), re.compile(rf"{_PEM_BEGIN.pattern}.*?(?:{_PEM_END.pattern}|\Z)", re.DOTALL), REDACTED),
)
_SHORTEST_SECRET = 8
"""Shorter values of secret variables are not searched for: they would blot out ordinary words."""
_SHORTEST_LINE = 20
"""Of a value of several lines, such as a key: logs are searched line by line."""
_USER_INFO = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*://([^/\s@:]*)(?::([^\s@]*))?@")
_NETRC = re.compile(r"\bpassword\s+(\"[^\"]+\"|\S+)")


@lru_cache(maxsize=4096)  # every line of a log asks it of every variable
def is_secret_name(name: str) -> bool:
    """Say whether a variable, option or key of this name holds a secret."""
    return (
        _SECRET_NAME.search(name) is not None
        and _VOCABULARY.search(name) is None
        and _PLACE.search(name) is None
    )


def known_secrets(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the secrets that this user has, each with where it was found, for messages.

    They are the values of the environment's secret variables, the passwords in addresses that other variables
    hold (proxies, mirrors), and what netrc, the hub's token file and the credential files of git and
    PostgreSQL say; also as an address or JSON would write them. A password in an address that is a short
    plain word, such as `postgres`, is not searched for elsewhere.

    Args:
        environ: By default, this process's.
    """
    variables = os.environ if environ is None else environ
    known, files = _of_variables(tuple(variables.items()))
    found = dict(known)
    for path, read in files:
        for value in read(path):
            _add(found, value, path.name)
    return found


@lru_cache(maxsize=4)
def _of_variables(
    variables: tuple[tuple[str, str], ...],
) -> tuple[Mapping[str, str], Sequence[tuple[Path, Callable[[Path], list[str]]]]]:
    """Return the secrets that variables hold, and the files that they lead to.

    Remembered, since every log record asks, and looking through the variables takes longer than the rest.
    """
    found: dict[str, str] = {}
    for name, value in sorted(variables):
        if is_secret_name(name):
            _add(found, value, f"the variable {name}")
        elif "@" in value:
            for password in _passwords(value):
                _add(found, password, f"the password in the variable {name}")
    return found, tuple(_credential_files(dict(variables)))


def secret_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the secrets of `known_secrets`, longest first."""
    return tuple(sorted(known_secrets(environ), key=lambda value: (-len(value), value)))


def find_secret(
    content: bytes, known: Mapping[str, str] | None = None, *, tokens: bool = True
) -> tuple[str, int] | None:
    """Return what secret stands in `content`, and in which line, or None.

    Known values and the shapes of tokens count. Addresses do not: program text and prose have examples. Nor
    does a password that is a plain word: whoever has `postgres` for one could run no program that names it.

    Args:
        content: Of a file.
        known: From `known_secrets`, for whoever asks about many files.
        tokens: Whether tokens count whose owner is not known.
    """
    for value, origin in (known_secrets() if known is None else known).items():
        at = -1 if _is_plain_word(value) else content.find(os.fsencode(value))
        if at >= 0:
            return f"the value of {origin}", content.count(b"\n", 0, at) + 1
    if not tokens or not any(needle.encode() in content for needle in _TOKEN_NEEDLES):
        return None
    if token := _TOKEN.search(content.decode("utf-8", "replace")):
        return "a token", token.string.count("\n", 0, token.start()) + 1
    return None


def redact_text(text: str, secrets: Sequence[str] = ()) -> str:
    """Return `text` with every secret that one of the nets catches replaced by `[redacted]`."""
    return _INLINE.sub(_hide_value, without_credentials(text, secrets))


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

    Stricter than `redact`, for values that must not be changed: only known secrets and the shapes of
    credentials count, not a prose that mentions a password.
    """
    secrets = secret_values() if secrets is None else secrets
    if isinstance(obj, str):
        return path if without_credentials(obj, secrets) != obj else None
    children: list[tuple[str, Any]] = []
    if isinstance(obj, dict):
        children = [(f"{path}.{key}", value) for key, value in obj.items()]
    elif isinstance(obj, list | tuple):
        children = [(f"{path}[{position}]", value) for position, value in enumerate(obj)]
    return next((hit for where, value in children if (hit := find_credential(value, secrets, where))), None)


def without_credentials(text: str, secrets: Sequence[str] | None = None) -> str:
    """Return `text` without known secrets and without what has the shape of a credential.

    As strict as `find_credential`: a log that mentions a token keeps its wording.
    """
    for secret in secret_values() if secrets is None else secrets:
        text = text.replace(secret, REDACTED)
    for needles, shape, replacement in _SHAPES:
        if any(needle in text for needle in needles):
            text = shape.sub(replacement, text)
    return text


def redacted_lines(lines: Iterable[str], secrets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each line of a text with itself without credentials; a private key goes over several lines."""
    inside = False
    for line in lines:
        safe, shown = "", line
        if inside and (ends := _PEM_END.search(line)) is not None:
            inside, shown = False, line[ends.end() :]
        if not inside:
            safe = without_credentials(shown, secrets)
            begins = _PEM_BEGIN.search(shown) if "-----BEGIN" in shown else None
            inside = begins is not None and _PEM_END.search(shown, begins.end()) is None
        if inside:  # of the key nothing is left but the ends of its lines
            safe = safe.rstrip("\r\n") + line[len(line.rstrip("\r\n")) :]
        yield line, safe


def credential_line(text: str, secrets: Sequence[str]) -> int | None:
    """Return the number of the first line of a text that holds a credential, from 1, or None."""
    lines = redacted_lines(text.splitlines(), secrets)
    return next((number for number, (line, safe) in enumerate(lines, start=1) if line != safe), None)


def clean_error(error: BaseException, secrets: Sequence[str] | None = None) -> bool:
    """Remove credentials from what an error and those that led to it say, in place.

    Libraries repeat addresses, headers and command lines, and whoever shows a traceback shows them all.

    An error that goes on saying one, because it makes its text of what nobody can reach, is taken out of
    the chain.

    Returns:
        Whether the error says none now; of the first one only its caller can be rid.
    """
    secrets = secret_values() if secrets is None else secrets
    seen = set[int]()
    _clean(error, secrets)
    waiting: list[BaseException] = [error]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        for link in ("__cause__", "__context__"):
            led = getattr(each, link)
            if led is None:
                continue
            _clean(led, secrets)
            if _says(led, secrets):
                setattr(each, link, None)
            else:
                waiting.append(led)
    return not _says(error, secrets)


def _clean(error: BaseException, secrets: Sequence[str]) -> None:
    """Remove credentials from the arguments, attributes and notes of one error."""
    if not _says(error, secrets):
        return
    error.args = tuple(_strict(value, secrets) for value in error.args)
    names = [*vars(error), *(("strerror", "filename", "filename2") if isinstance(error, OSError) else ())]
    for name in names:
        value = getattr(error, name, None)
        if isinstance(value, str | list | tuple) and (safe := _strict(value, secrets)) != value:
            try:
                setattr(error, name, safe)
            except (AttributeError, TypeError):  # a property of its own
                continue


def _says(error: BaseException, secrets: Sequence[str]) -> bool:
    parts = (*error.args, *vars(error).values())
    plain = [value for value in parts if isinstance(value, str | list | tuple)]
    return find_credential([str(error), *plain], secrets) is not None


def _strict(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return without_credentials(value, secrets)
    if isinstance(value, list | tuple):
        safe = [_strict(item, secrets) for item in value]
        return tuple(safe) if isinstance(value, tuple) else safe
    return value


def _add(found: dict[str, str], value: str, origin: str) -> None:
    """Note a secret as it is, as an address and as JSON write it, and line by line."""
    lines = value.splitlines() if "\n" in value else []
    for form in (value, *(line for line in lines if len(line) >= _SHORTEST_LINE and "-----" not in line)):
        for written in (form, quote(form, safe=""), json.dumps(form)[1:-1]):
            if len(form) >= _SHORTEST_SECRET:
                found.setdefault(written, origin)


def _passwords(text: str) -> Iterator[str]:
    """Yield the passwords in the addresses of a text; of one without, a user's name that can be a token."""
    for user, password in _USER_INFO.findall(text):
        given = password or (user if len(user) >= _SHORTEST_LINE else "")
        for form in {given, unquote(given)}:
            if not _is_plain_word(form):
                yield form


def _is_plain_word(value: str) -> bool:
    return value.isalpha() and value.islower() and len(value) < _SHORTEST_LINE


def _credential_files(environ: Mapping[str, str]) -> Iterator[tuple[Path, Callable[[Path], list[str]]]]:
    """Yield the files in which this user's programs keep credentials, each with what reads them."""
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(environ.get("HF_HOME") or cache / "huggingface")
    yield Path(environ.get("NETRC") or home / ".netrc"), _netrc
    yield Path(environ.get("HF_TOKEN_PATH") or hub / "token"), _whole
    yield home / ".git-credentials", _addresses
    yield Path(environ.get("PGPASSFILE") or home / ".pgpass"), _pgpass


def _netrc(path: Path) -> list[str]:
    return [word.strip('"') for word in _NETRC.findall(_text(path))]


def _whole(path: Path) -> list[str]:
    return [_text(path).strip()]


def _addresses(path: Path) -> list[str]:
    return list(_passwords(_text(path)))


def _pgpass(path: Path) -> list[str]:
    rows = [line.split(":", 4) for line in _text(path).splitlines() if not line.startswith("#")]
    return [row[4] for row in rows if len(row) == 5]


def _text(path: Path) -> str:
    """Return the text of a credential file; empty where there is none that this user may read."""
    try:
        known = path.stat()
    except OSError:
        return ""
    return _read(path, known.st_mtime_ns, known.st_size)


@lru_cache(maxsize=16)
def _read(path: Path, modified_ns: int, size: int) -> str:
    """Return a file's text; it is read again when it was saved since."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if size < 1 << 20 else ""
    except OSError:
        return ""


def _hide_value(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"].lstrip("-")):
        return match[0]
    return f"{match['name']}{match['sep']}{REDACTED}"
