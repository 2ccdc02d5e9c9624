"""The published donors at a pinned commit: fetched, verified, and of gpt-oss only what is used."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.contract.donor import HF_EMBEDDING, HF_HEAD
from trainer.contract.schema.sources import HubDonor, HubTeacher, HubVocabulary
from vpmoe_assets.donors.checkpoints import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_weight_map
from vpmoe_assets.donors.manifest import donor_manifest
from vpmoe_assets.donors.tensors import copy_tensors
from vpmoe_assets.donors.tokenizers import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from vpmoe_assets.errors import DonorError
from vpmoe_assets.hub import (
    HubClient,
    HubError,
    HubFile,
    HuggingFaceHub,
    fetch,
    require_commit,
    select_files,
)

NEEDED = (CONFIG_NAME, TOKENIZER_NAME)
WELCOME = (TOKENIZER_CONFIG_NAME, "generation_config.json", INDEX_NAME)
"""Small files that are taken where the commit has them."""

Progress = Callable[[int], None]


def fetch_qwen3(
    source: HubDonor, directory: Path, *, client: HubClient | None = None, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Bring the dense donor here: configuration, tokenizer and every weight file.

    Args:
        source: Repository, commit and pins.
        directory: Kept between attempts, so that nothing is downloaded twice.
        client: Of the hub; the public one by default.
        progress: Called with the number of new bytes.

    Returns:
        The manifest.

    Raises:
        HubError: The hub cannot be reached, or what it has is not what was pinned.
    """
    return _fetch_whole(source, "sources.qwen3_0_6b", directory, client, progress)


def fetch_teacher(
    source: HubTeacher,
    directory: Path,
    *,
    client: HubClient | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Bring a teacher here: configuration, tokenizer and every weight file at the top of its repository.

    Args:
        source: Repository, commit and pins.
        directory: Kept between attempts, so that nothing is downloaded twice.
        client: Of the hub; the public one by default.
        progress: Called with the number of new bytes.

    Returns:
        The manifest.

    Raises:
        HubError: The hub cannot be reached, or what it has is not what was pinned.
    """
    return _fetch_whole(source, "sources.teacher", directory, client, progress)


def _fetch_whole(
    source: HubDonor | HubTeacher, key: str, directory: Path, client: HubClient | None, progress: Progress
) -> dict[str, Any]:
    hub, listing = _open(source, key, client)
    weights = [path for path in listing if path.endswith(".safetensors") and "/" not in path]
    if not weights:
        raise HubError(f"{source.repo} at {source.revision} has no *.safetensors file")
    files = _choose(source, listing, [*NEEDED, *weights], WELCOME)
    for file in files:
        fetch(hub, source.repo, "model", source.revision, file, directory, progress=progress)
    return donor_manifest(
        f"{source.repo} at commit {source.revision}.", directory, repo=source.repo, revision=source.revision
    )


def fetch_vocabulary(
    source: HubVocabulary,
    directory: Path,
    downloads: Path,
    *,
    client: HubClient | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Bring the vocabulary donor here: configuration, tokenizer, and of the weights embedding and head.

    Only the shards that hold these two are fetched. They are verified whole, then the two tensors are copied
    out of them.

    Args:
        source: Repository, commit and pins.
        directory: To fill.
        downloads: Where shards lie between attempts.
        client: Of the hub; the public one by default.
        progress: Called with the number of new bytes.

    Returns:
        The manifest; it says which shards were read, with their sha256.

    Raises:
        HubError: The hub cannot be reached, or what it has is not what was pinned.
        DonorError: The checkpoint has no such tensors.
    """
    hub, listing = _open(source, "sources.gpt_oss_20b", client)

    def bring(files: Iterable[HubFile], into: Path) -> list[HubFile]:
        chosen = list(files)
        for file in chosen:
            fetch(hub, source.repo, "model", source.revision, file, into, progress=progress)
        return chosen

    bring(_choose(source, listing, NEEDED, [TOKENIZER_CONFIG_NAME]), directory)
    bring(_choose(source, listing, [INDEX_NAME], []), downloads)
    weight_map = read_weight_map(downloads / INDEX_NAME)
    if missing := [name for name in (HF_EMBEDDING, HF_HEAD) if name not in weight_map]:
        raise DonorError(f"{source.repo}: {INDEX_NAME} names no {' and no '.join(missing)}")
    shards = sorted({weight_map[HF_EMBEDDING], weight_map[HF_HEAD]})
    read = bring(_choose(source, listing, shards, []), downloads)
    copy_tensors(
        {name: downloads / weight_map[name] for name in (HF_EMBEDDING, HF_HEAD)}, directory / WEIGHTS_NAME
    )
    return donor_manifest(
        f"Tokenizer, embedding and head of {source.repo} at commit {source.revision}.",
        directory,
        repo=source.repo,
        revision=source.revision,
        read=[{"path": file.path, "bytes": file.size, "sha256": file.sha256} for file in read],
    )


def _open(
    source: HubDonor | HubTeacher | HubVocabulary, key: str, client: HubClient | None
) -> tuple[HubClient, dict[str, HubFile]]:
    source.require_pins(key)
    require_commit(source.repo, source.revision, f"{key}.revision")
    hub = client if client is not None else HuggingFaceHub()
    return hub, {file.path: file for file in hub.list_files(source.repo, "model", source.revision)}


def _choose(
    source: HubDonor | HubTeacher | HubVocabulary,
    listing: dict[str, HubFile],
    needed: Iterable[str],
    welcome: Iterable[str],
) -> list[HubFile]:
    """Return the files to take with their digests: pinned, or else as the commit names them."""
    wanted = [*needed, *(path for path in welcome if path in listing)]
    pins = {path: source.files[path] for path in wanted if path in source.files}
    chosen = select_files(listing.values(), pins) if pins else []
    for path in wanted:
        if path not in pins:
            if path not in listing:
                raise HubError(
                    f"{source.repo} at {source.revision} has no {path}; it has {len(listing)} files"
                )
            chosen.append(listing[path])
    return chosen
