"""Files of a hub repository at one commit: listed, streamed, resumed, accepted by their digest only.

A commit names every large file by its sha256 and every small one by its git id, so a pinned revision pins
the bytes. A download that was cut off goes on where it stopped; a file that is there already is taken as it
is once its digest agrees.
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vpmoe_assets.errors import DataError

RepoType = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20


class HubError(DataError):
    """The hub cannot be reached, or what it holds is not what was pinned."""


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

    def read(self, repo: str, repo_type: RepoType, revision: str, path: str, offset: int) -> Iterator[bytes]:
        """Return the file's bytes from `offset` on."""


class HuggingFaceHub:
    """The public hub, through `huggingface_hub` (its token, proxy and offline settings apply).

    Args:
        endpoint: Address of the hub; None is the library's own.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def list_files(self, repo: str, repo_type: RepoType, revision: str) -> list[HubFile]:
        """All files of the commit.

        Raises:
            HubError: No network, no such repository or commit, no access.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _translated(repo, revision):
            entries = HfApi(endpoint=self._endpoint).list_repo_tree(
                repo, recursive=True, revision=revision, repo_type=repo_type
            )
            return [
                HubFile(entry.path, entry.size, entry.lfs.sha256)
                if entry.lfs  # its git id is that of a pointer, not of the bytes
                else HubFile(entry.path, entry.size, None, entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile)
            ]

    def read(self, repo: str, repo_type: RepoType, revision: str, path: str, offset: int) -> Iterator[bytes]:
        """Stream the file's bytes from `offset` on.

        Raises:
            HubError: As for `list_files`; also a server that ignores the offset.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        with _translated(repo, revision):
            url = hf_hub_url(repo, path, repo_type=repo_type, revision=revision, endpoint=self._endpoint)
            # Identity: a compressed answer would count its own bytes, not the file's.
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            if offset:
                headers["Range"] = f"bytes={offset}-"
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                if offset and response.status_code != 206:
                    raise HubError(
                        f"{repo}: the server sent {path} from the start (status {response.status_code}) "
                        f"although byte {offset} was asked for; remove the partial file and try again"
                    )
                yield from response.iter_bytes(_CHUNK)


class _translated:  # noqa: N801 -- reads as a statement: with _translated(...)
    """Turns the library's errors, which name neither cause nor remedy, into one that does."""

    def __init__(self, repo: str, revision: str) -> None:
        self._what = f"{repo} at {revision}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, HubError | GeneratorExit):
            return
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        # httpx or httpx2, by the release of huggingface_hub: known by name only.
        unreachable = any(base.__name__ == "TransportError" for base in type(error).__mro__)
        if unreachable or isinstance(error, OfflineModeIsEnabled):
            raise HubError(
                f"{self._what}: the hub cannot be reached ({type(error).__name__}: {error}). This source "
                "needs a network; run it where the hub is reachable, or choose a source that is local "
                '(sources.synth: kind = "generated" or "parquet"; sources.healing_corpus: kind = '
                '"pydoc_topics" or "folder"; sources.qwen3_0_6b and sources.gpt_oss_20b: kind = "seeded")'
            ) from error
        if isinstance(error, HfHubHTTPError):
            raise HubError(f"{self._what}: {error}") from error


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

    Returns:
        The file's path; its bytes have the expected digest.

    Raises:
        HubError: The hub cannot be reached, or sent other bytes (the partial file is then removed).
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
    digest = _digest(partial, file) if partial.is_file() else file.hasher()
    done = partial.stat().st_size if partial.is_file() else 0
    progress(done)
    with partial.open("ab") as stream:
        if done < file.size:
            for chunk in client.read(repo, repo_type, revision, file.path, done):
                stream.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
    if done < file.size:
        raise HubError(
            f"{repo}/{file.path}: the connection ended after {done} of {file.size} bytes; "
            "start again, it will go on there"
        )
    if digest.hexdigest() != file.digest:
        partial.unlink()
        kind = "git id" if file.sha256 is None else "sha256"
        raise HubError(
            f"{repo}/{file.path}: received {done} bytes with {kind} {digest.hexdigest()}, "
            f"expected {file.size} bytes with {file.digest}; the partial file was removed"
        )
    partial.replace(target)
    return target


def _digest(path: Path, file: HubFile) -> "hashlib._Hash":
    digest = file.hasher()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest
