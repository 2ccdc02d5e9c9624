"""Torch's `.metadata` is a pickle: looked through before anything opens it.

A pickle names the functions and classes by which it is put together, and whoever writes one may name
`os.system`. What torch writes names the few below, none of which does anything but hold values; a file that
names another one is none of torch's. Checksums do not tell: whoever can change this file can change them too.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

NAME = ".metadata"
_HARMLESS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class UnsafePickleError(ValueError):
    """A pickle would run code that what it should hold does not need; the message names file and code."""


class _Harmless(pickle.Unpickler):
    """Loads what is put together by nothing but what is known to be harmless."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        """Return a class or function that is on the list, by its exact name."""
        if name not in _HARMLESS.get(module, ()):
            raise UnsafePickleError(
                f"{self._path} would run {module}.{name} when it is opened, so it was not: no "
                "checkpoint needs that. Remove this checkpoint, and find out who wrote it"
            )
        return super().find_class(module, name)


def require_plain_metadata(directory: Path) -> None:
    """Refuse a distributed checkpoint whose `.metadata` names code that is not torch's own for it.

    Args:
        directory: Of the checkpoint. One without the file is left to its reader to refuse.

    Raises:
        UnsafePickleError: It does, or is no pickle.
    """
    path = directory / NAME
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            _Harmless(path, file).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # whatever classes and the unpickler raise at values that they do not expect
        raise UnsafePickleError(f"{path} is damaged ({type(error).__name__}: {error})") from error
