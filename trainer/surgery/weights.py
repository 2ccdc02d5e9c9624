"""Checkpoints as directories: opened with every file checked, written one tensor at a time."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from trainer.checkpoints.format import (
    CONFIG_NAME,
    INDEX_NAME,
    SCHEMA,
    SHARD_BYTES,
    plan_shards,
    shard_name,
    write_config,
    write_index,
)
from trainer.contract.differences import differences
from trainer.contract.geometry import geometry
from trainer.contract.json_text import parse_json
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError, parse, plain
from trainer.surgery.tensorfile import TensorFile, TensorFileWriter, TensorSpec, WeightsError, raw
from trainer.surgery.tensors import BUFFERS, TORCH_DTYPES, tensor_table

SINGLE_NAME = "model.safetensors"


class WeightsReader:
    """A checkpoint directory, ours or Hugging Face's: safetensors with or without an index.

    All files are opened and compared with the index at once; tensors are read when asked for and never mapped
    into memory.

    Args:
        directory: The payload.

    Attributes:
        config: Content of `config.json`.
        specs: Shape and type of every tensor, by name.

    Raises:
        WeightsError: A file is missing, cut or unreadable, or index and files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_json(directory / CONFIG_NAME)
        self._files: dict[str, TensorFile] = {}
        self._file_of: dict[str, TensorFile] = {}
        try:
            self._open(self._weight_map())
        except BaseException:
            self.close()
            raise
        self.specs = {name: file.specs[name] for name, file in sorted(self._file_of.items())}

    def _weight_map(self) -> dict[str, str] | None:
        index = self.directory / INDEX_NAME
        if not index.is_file():
            return None
        weight_map: dict[str, str] = _read_json(index).get("weight_map", {})
        if not weight_map:
            raise WeightsError(f"{index}: no weight_map found")
        return weight_map

    def _open(self, weight_map: Mapping[str, str] | None) -> None:
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        missing = [name for name in names if Path(name).name != name or not (self.directory / name).is_file()]
        if missing:
            present = sorted(path.name for path in self.directory.glob("*.safetensors"))
            raise WeightsError(
                f"{self.directory}: {len(missing)} of {len(names)} weight files missing: "
                f"{', '.join(missing)}; found {', '.join(present) or 'none'}. "
                "Materialize the artifact again, or restore the file"
            )
        for name in names:
            self._files[name] = TensorFile(self.directory / name)
            self._file_of |= dict.fromkeys(self._files[name].specs, self._files[name])
        stored = {tensor: name for name, file in self._files.items() for tensor in file.specs}
        if weight_map is not None and stored != weight_map:
            wrong = sorted(
                key for key in stored.keys() | weight_map.keys() if stored.get(key) != weight_map.get(key)
            )
            raise WeightsError(
                f"{self.directory}: {INDEX_NAME} and the weight files disagree about {len(wrong)} tensors: "
                + "; ".join(
                    f"{key} is in {stored.get(key, 'no file')}, index says {weight_map.get(key, 'nothing')}"
                    for key in wrong[:4]
                )
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, by name."""
        return tuple(self._files[name].path for name in sorted(self._files))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return a tensor, or its rows `start` to `stop`, in its stored type.

        Raises:
            WeightsError: No such tensor.
        """
        if name not in self._file_of:
            raise WeightsError(f"{self.directory}: no tensor {name} among {len(self._file_of)}")
        return self._file_of[name].read(name, start, stop)

    def read_fp32(self, name: str) -> torch.Tensor:
        """Return a tensor in fp32, the type of all arithmetic of a conversion."""
        return self.read(name).float()

    def digest(self, name: str) -> str:
        """sha256 of a tensor's stored bytes, in hex."""
        return hashlib.sha256(raw(self.read(name))).hexdigest()

    def require(self, expected: Mapping[str, TensorSpec], *, any_dtype: bool = False) -> None:
        """Refuse a checkpoint that does not hold exactly these tensors.

        Args:
            expected: All of them.
            any_dtype: Compare names and shapes only; the type must still be a floating-point one.

        Raises:
            WeightsError: Naming what is missing, unknown or different, with expected and found.
        """
        missing = sorted(expected.keys() - self.specs.keys())
        unknown = sorted(self.specs.keys() - expected.keys())
        problems = []
        if missing:
            problems.append(f"{len(missing)} tensors missing: {', '.join(missing[:4])}")
        if unknown:
            problems.append(f"{len(unknown)} tensors not expected: {', '.join(unknown[:4])}")
        for name, spec in expected.items():
            found = self.specs.get(name, spec)
            if any_dtype and found.dtype.is_floating_point:
                found = TensorSpec(found.shape, spec.dtype)
            if found != spec:
                problems.append(f"{name}: {spec} expected, {self.specs[name]} found")
        if problems:
            more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise WeightsError(f"{self.directory}: " + "; ".join(problems[:6]) + more)

    def require_rung(self, architecture: Architecture, dtype: str) -> None:
        """Refuse a checkpoint that is not a published rung of this geometry and type.

        Raises:
            WeightsError: The schema, the architecture, the type or a tensor differs.
        """
        if self.config.get("schema") != SCHEMA:
            raise WeightsError(
                f"{self.directory / CONFIG_NAME}: schema {SCHEMA!r} expected, "
                f"{self.config.get('schema')!r} found"
            )
        try:
            stored = parse(Architecture, self.config.get("architecture"), origin="architecture")
        except ConfigError as error:
            raise WeightsError(f"{self.directory / CONFIG_NAME}: {error}") from None
        asked = {"architecture": plain(geometry(architecture)), "dtype": str(TORCH_DTYPES[dtype])[6:]}
        found = {"architecture": plain(geometry(stored)), "dtype": self.config.get("dtype")}
        if wrong := shown_differences(asked, found):
            raise WeightsError(f"{self.directory / CONFIG_NAME}: {wrong}")
        self.require(tensor_table(architecture, dtype))

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WeightsWriter:
    """A published checkpoint, filled one tensor at a time in any order: memory holds one tensor.

    For the same weights the files are those of `trainer.checkpoints.published.save_published`, byte for
    byte.

    Args:
        directory: To create or fill; must be empty.
        architecture: Decides which tensors there are.
        dtype: `fp32` or `bf16`; what is fp32 in every model stays so.
        shard_bytes: Largest shard, unless one tensor alone is larger.

    Attributes:
        specs: Every tensor to write.
        on_write: Called with each tensor's name after it was written; may raise to stop.
        digests: sha256 of those written.

    Raises:
        WeightsError: The directory holds something already.
        OSError: The disk has no room for all of it.
    """

    def __init__(
        self,
        directory: Path,
        architecture: Architecture,
        dtype: str,
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise WeightsError(f"{directory} is not empty: weights are never written over")
        self.directory, self.architecture, self.dtype = directory, architecture, dtype
        self.specs = tensor_table(architecture, dtype)
        self.on_write: Callable[[str], object] = lambda name: None
        shards = plan_shards({name: spec.nbytes for name, spec in self.specs.items()}, shard_bytes)
        self._writers: list[TensorFileWriter] = []
        self._writer_of: dict[str, TensorFileWriter] = {}
        try:
            for number, names in enumerate(shards, start=1):
                path = directory / shard_name(number, len(shards))
                writer = TensorFileWriter(path, {name: self.specs[name] for name in names})
                self._writers.append(writer)
                self._writer_of |= dict.fromkeys(names, writer)
        except BaseException:
            self.close()
            raise

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every tensor written so far."""
        return {name: digest for writer in self._writers for name, digest in writer.digests.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Cast a tensor to its stored type and write it.

        Args:
            name: Megatron parameter name.
            tensor: Its whole value, on any device, floating point.

        Raises:
            WeightsError: Unknown name, written before, another shape, or a value that is not finite in the
                stored type.
        """
        if name not in self._writer_of:
            raise WeightsError(f"{name}: the architecture has no such tensor")
        cast = tensor.detach().to("cpu", self.specs[name].dtype)
        if cast.numel():
            low, high = torch.aminmax(cast)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise WeightsError(f"{name}: NaN or infinity in the converted tensor ({self.specs[name]})")
        self._writer_of[name].write(name, cast)
        self.on_write(name)

    def finish(self) -> None:
        """Flush all shards, then write index and `config.json`.

        Raises:
            WeightsError: A tensor was not written.
        """
        if missing := sorted(self.specs.keys() - self.digests.keys()):
            raise WeightsError(f"{len(missing)} tensors were not written: {', '.join(missing[:4])}")
        for writer in self._writers:
            writer.finish()
        weight_map = {name: writer.path.name for name, writer in self._writer_of.items()}
        write_index(self.directory, weight_map, sum(spec.nbytes for spec in self.specs.values()))
        write_config(
            self.directory,
            self.architecture,
            dtype=str(TORCH_DTYPES[self.dtype])[6:],
            parameters=sum(
                spec.elements for name, spec in self.specs.items() if name.rpartition(".")[2] not in BUFFERS
            ),
            tensors=len(self.specs),
        )

    def close(self) -> None:
        """Close what is open; without `finish` before, the files are worthless."""
        for writer in self._writers:
            writer.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shown_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the keys in which two tables differ, with both values, as text; empty where they are equal."""
    wrong = list(differences(expected, found).items())
    return "; ".join(f"{key}: {ours!r} expected, {theirs!r} found" for key, (ours, theirs) in wrong[:8])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; a checkpoint has one") from None
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: an object expected, {type(content).__name__} found")
    return content
