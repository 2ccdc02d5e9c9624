"""Asking git about the checkout of this project, whatever the environment says of another repository."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vpmoe_assets.lineage.errors import ProvenanceError

# What only bounds git's search for the checkout, or says where git is installed. Every other GIT_ variable
# can put a repository, tree, index or settings of somebody else in the place of the checkout's: git itself
# sets GIT_DIR and GIT_INDEX_FILE while a hook runs, some people export GIT_DIR for their dotfiles.
_HARMLESS = {"GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM", "GIT_EXEC_PATH"}


def git(
    root: Path, *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> bytes:
    """Run git on the checkout that `root` lies in, and return what it prints.

    Args:
        root: A directory.
        arguments: After `git`.
        stdin: What git reads.
        environment: Variables to add.

    Raises:
        ProvenanceError: git is not installed, or fails; says in its own words why.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _HARMLESS
    }
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            env={**inherited, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **(environment or {})},
        )
    except FileNotFoundError as error:
        raise ProvenanceError("git is not installed") from error
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ProvenanceError(
            f"git {arguments[0]}: {lines[0] if lines else f'exit code {result.returncode}'}"
        )
    return result.stdout
