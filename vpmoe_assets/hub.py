"""Files of a hub repository at one commit: listed, streamed, resumed, accepted by their digest only.

A commit names every large file by its sha256 and every small one by its git id, so a pinned revision pins
the bytes. A download that was cut off goes on where it stopped; a file that is there already is taken as it
is once its digest agrees.

Why `huggingface_hub` lends its client, headers and errors and not its downloader, tried with 2.4 against a
server with faults: its listing waits for ever for a silent hub (it asks without a time-out), a file is given
up at the first 5xx, what came of one below 10 MB is thrown away at every stall and at the end, and bytes of
the right length are taken whatever they are.
"""

import fnmatch
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from vpmoe_assets.network import (
    PATIENCE,
    NetworkError,
    Patience,
    bytes_of,
    client_of,
    receive,
    require_success,
    timeout_seconds,
    translated,
)

RepoType = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20


_ELSEWHERE = (
    "this source needs a network; run it where the hub is reachable, or choose a source that is local "
    '(sources.synth: kind = "generated" or "parquet"; sources.healing_corpus: kind = "pydoc_topics" or '
    '"folder"; sources.qwen3_0_6b and sources.gpt_oss_20b: kind = "seeded")'
)

_log = logging.getLogger(__name__)


class HubError(NetworkError):
    """The hub does not give what was asked, or what it holds is not what was pinned."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit.

    Attributes:
        path: Inside the repository.
        size: In bytes.
        sha256: As the commit names it; None for small files, which a commit names by their git id only.
        git_id: Of a small file's content, as git computes it; what counts where there is no sha256.
    """

    path: str
    size: int
    sha256: str | None
    git_id: str | None = None

    def hasher(self) -> "hashlib._Hash":
        """Return a hash that gives `digest` when it has seen the file's bytes."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    @property
    def digest(self) -> str:
        """The digest that the bytes must have.

        Raises:
            HubError: The commit names none.
        """
        if (digest := self.sha256 or self.git_id) is None:
            raise HubError(f"{self.path}: the commit names no digest for it; pin its sha256")
        return digest


class HubClient(Protocol):
    """The two things that are asked of a hub."""

    def list_files(self, repo: str, repo_type: RepoType, revision: str) -> list[HubFile]:
        """All files of the commit."""

    def read(
        self, repo: str, repo_type: RepoType, revision: str, file: HubFile, offset: int
    ) -> Iterator[bytes]:
        """Return the file's bytes from `offset` on, asked for once.

        Raises:
            TransientError: Another attempt may mend it.
        """


class HuggingFaceHub:
    """The public hub, with the client of `huggingface_hub` (its token, proxy and offline settings apply).

    Args:
        endpoint: Address of the hub; None is the library's own.
        patience: With a listing; with a file it is that of `fetch`.
        timeout: Seconds without a byte; None takes those of `HF_HUB_DOWNLOAD_TIMEOUT`.
    """

    def __init__(
        self, endpoint: str | None = None, *, patience: Patience = PATIENCE, timeout: float | None = None
    ) -> None:
        self._endpoint = endpoint
        self._patience = patience
        self._timeout = timeout

    def list_files(self, repo: str, repo_type: RepoType, revision: str) -> list[HubFile]:
        """All files of the commit.

        Raises:
            HubError: No such repository or commit, no access, or no list of files.
            NetworkError: No network, or a hub that stays silent or busy.
        """
        return self._patience.persist(lambda: self._list(repo, repo_type, revision), _ELSEWHERE)

    def read(
        self, repo: str, repo_type: RepoType, revision: str, file: HubFile, offset: int
    ) -> Iterator[bytes]:
        """Stream the file's bytes from `offset` on, asked for once.

        Raises:
            TransientError: No network, or a hub that is silent or busy.
            HubError: No access, or an answer that is not the file.
        """
        with self._session(f"{repo}/{file.path}") as (client, headers, seconds):
            from huggingface_hub import hf_hub_url

            url = hf_hub_url(repo, file.path, repo_type=repo_type, revision=revision, endpoint=self._endpoint)
            yield from bytes_of(
                client,
                url,
                f"{repo}/{file.path}",
                offset=offset,
                size=file.size,
                headers=headers,
                timeout=seconds,
                refuse=_refuse,
            )

    def _list(self, repo: str, repo_type: RepoType, revision: str) -> list[HubFile]:
        what = f"{repo} at {revision}"
        found: list[HubFile] = []
        with self._session(what) as (client, headers, seconds), translated(what, seconds):
            from huggingface_hub.constants import ENDPOINT

            start = (self._endpoint or ENDPOINT).rstrip("/")
            url = f"{start}/api/{repo_type}s/{repo}/tree/{revision}?recursive=true"
            while url:
                answer = client.get(url, headers=headers, follow_redirects=True, timeout=seconds)
                require_success(answer, what, _refuse)
                try:
                    entries = [entry for entry in answer.json() if entry["type"] == "file"]
                    found += [_file_of(entry) for entry in entries]
                except (ValueError, KeyError, TypeError) as error:
                    kind = answer.headers.get("content-type", "no type")
                    raise HubError(
                        f"{what}: the answer is no list of files ({kind}, {len(answer.content)} bytes); see "
                        f"whether a proxy or a page to sign in to answers at {answer.url.host}"
                    ) from error
                url = answer.links.get("next", {}).get("url")
        return found

    @contextmanager
    def _session(self, what: str) -> Iterator[tuple[Any, dict[str, str], float]]:
        """Give the library's client, headers and time-out; its errors become one that says what to do."""
        # The library reads both when it is imported, and fails at a wrong one without naming it.
        seconds = self._timeout or timeout_seconds()
        timeout_seconds("HF_HUB_ETAG_TIMEOUT")
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers, get_session

        try:
            yield client_of(get_session), build_hf_headers(), seconds
        except OfflineModeIsEnabled as error:
            raise HubError(
                f"{what}: the hub cannot be reached (offline mode, HF_HUB_OFFLINE); {_ELSEWHERE}"
            ) from error
        except HfHubHTTPError as error:
            raise HubError(f"{what}: {' '.join(str(error).split())}") from error


def _refuse(response: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)


def _file_of(entry: dict[str, Any]) -> HubFile:
    size = int(entry["size"])
    if (large := entry.get("lfs")) is not None:  # its git id is that of a pointer, not of the bytes
        return HubFile(str(entry["path"]), size, str(large["oid"]))
    return HubFile(str(entry["path"]), size, None, str(entry["oid"]))


def select_files(
    listing: Iterable[HubFile], pins: Mapping[str, str], *, pattern: str = "*.parquet"
) -> list[HubFile]:
    """Return the files to take, sorted by path, each with the sha256 that it must have.

    Args:
        listing: Files of the commit.
        pins: sha256 by path; empty takes every file that matches `pattern`.
        pattern: Of paths.

    Raises:
        HubError: A pinned file is absent, the commit names another digest than the pin, nothing matches, or a
            file has no digest at all.
    """
    by_path = {file.path: file for file in listing}
    wanted = sorted(pins) if pins else sorted(path for path in by_path if fnmatch.fnmatch(path, pattern))
    if not wanted:
        raise HubError(f"no file of the commit matches {pattern!r}; it has {len(by_path)} files")
    chosen = []
    for path in wanted:
        if (file := by_path.get(path)) is None:
            raise HubError(f"{path} is pinned, but the commit has no such file; it has {len(by_path)} files")
        pin = pins.get(path) or file.sha256
        if pin is None:
            raise HubError(f"{path}: the commit names no sha256 for it; pin one in the source's files table")
        if file.sha256 is not None and file.sha256 != pin:
            raise HubError(f"{path}: pinned sha256 {pin}, but the commit names {file.sha256}")
        chosen.append(HubFile(path, file.size, pin))
    return chosen


def require_commit(repo: str, revision: str, key: str) -> None:
    """Refuse a revision that is not a full commit.

    Raises:
        HubError: Naming the config key.
    """
    if not _COMMIT.fullmatch(revision):
        raise HubError(
            f"{key} = {revision!r} pins nothing; set it to the 40-digit commit of {repo} that is to be used"
        )


def fetch(
    client: HubClient,
    repo: str,
    repo_type: RepoType,
    revision: str,
    file: HubFile,
    directory: Path,
    *,
    progress: Callable[[int], None] = lambda _: None,
    patience: Patience = PATIENCE,
) -> Path:
    """Bring one file here, going on from what an earlier attempt left.

    Args:
        client: Of the hub.
        repo: `owner/name`.
        repo_type: Model or dataset.
        revision: Commit.
        file: Path, size and the digest that it must have.
        directory: The file lands below it under its path in the repository.
        progress: Called with the number of new bytes.
        patience: With a hub that is silent or busy, and with connections that break.

    Returns:
        The file's path; its bytes have the expected digest.

    Raises:
        NetworkError: The hub cannot be reached; what came is kept.
        HubError: It sent other bytes (the partial file is then removed).
    """
    target = directory / file.path
    if not target.resolve().is_relative_to(directory.resolve()):
        raise HubError(f"{repo}: the path {file.path!r} leaves the download directory")
    if target.is_file() and _digest(target, file).hexdigest() == file.digest:
        progress(file.size)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Named by its digest: a partial file of another commit is never continued.
    partial = target.with_name(f".{target.name}.{file.digest}.part")
    begun = partial.stat().st_size if partial.is_file() else 0
    if begun > file.size:
        partial.unlink()
        begun = 0
    found = _complete(client, repo, repo_type, revision, file, partial, progress, patience)
    if found != file.digest and begun:
        _log.warning("%s/%s: what an earlier attempt left is not its beginning; once more", repo, file.path)
        partial.unlink()
        found = _complete(client, repo, repo_type, revision, file, partial, progress, patience)
    if found != file.digest:
        size = partial.stat().st_size
        partial.unlink()
        kind = "git id" if file.sha256 is None else "sha256"
        raise HubError(
            f"{repo}/{file.path}: received {size} bytes with {kind} {found}, "
            f"expected {file.size} bytes with {file.digest}; the partial file was removed"
        )
    partial.replace(target)
    return target


def _complete(
    client: HubClient,
    repo: str,
    repo_type: RepoType,
    revision: str,
    file: HubFile,
    partial: Path,
    progress: Callable[[int], None],
    patience: Patience,
) -> str:
    """Bring the rest of a partial file; return the digest of the whole."""
    digest = _digest(partial, file) if partial.is_file() else file.hasher()
    progress(partial.stat().st_size if partial.is_file() else 0)

    def seen(chunk: bytes) -> None:
        digest.update(chunk)
        progress(len(chunk))

    receive(
        lambda offset: client.read(repo, repo_type, revision, file, offset),
        partial,
        f"{repo}/{file.path}",
        size=file.size,
        patience=patience,
        seen=seen,
    )
    return digest.hexdigest()


def _digest(path: Path, file: HubFile) -> "hashlib._Hash":
    digest = file.hasher()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest
