"""A Ray cluster as its driver sees it: reached in time, or refused; machines that see the same files.

Only the drivers' processes import this; a driver that ends, however it ends, takes along all that it had
running in the cluster.
"""

import contextlib
import hashlib
import os
import platform
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import DataError, WorkerError
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources.ray.settings import RaySettings, host_port

_PACKAGES = ("numpy", "pyarrow", "tiktoken", "torch", "ray")
"""What a shard's bytes may depend on, beside the sources and Python."""
_SHOWN = 4


class ClusterError(DataError):
    """The cluster cannot be used as asked; the message says what was found and what to do."""


@dataclass(frozen=True)
class Place:
    """A file by which the machines of a cluster show that they see what this one does.

    Attributes:
        path: Of the file.
        content: That is in it.
        code: Of the driver's machine; see `code_here`.
    """

    path: str
    content: str
    code: Mapping[str, str]

    def wrong(self) -> str | None:
        """Return what is wrong where this runs, in words; None if nothing is."""
        try:
            found = Path(self.path).read_text(encoding="utf-8")
        except OSError as error:
            return f"does not see {self.path} ({error.strerror})"
        if found != self.content:
            return f"sees another file at {self.path}"
        found_code = code_here(sources="sources" in self.code)
        if found_code != self.code:
            return f"has other code: {_difference(self.code, found_code)}"
        return None


def code_here(*, sources: bool) -> dict[str, str]:
    """Return what decides bytes of this machine's software: releases, and the sources' digest if asked."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if sources:
        digest = hashlib.sha256()
        for package in ("vpmoe_assets", "trainer"):
            for path in sorted((ROOT / package).rglob("*.py")):
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
        found["sources"] = digest.hexdigest()[:12]
    return found


def _difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    differing = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    return ", ".join(
        f"{name} {there.get(name, 'none')} instead of {here.get(name, 'none')}" for name in differing
    )


def connect(settings: RaySettings) -> None:
    """Become a driver of the cluster.

    Raises:
        ClusterError: Nobody answers, or what answers is not such a cluster.
    """
    require_listening(settings)
    address = settings.address
    # Ray would ask for many minutes whether a cluster is there after all.
    os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", "5")
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "10")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        ray.init(
            address=address,
            _node_ip_address=settings.node_ip,
            namespace="vpmoe",
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    except Exception as error:
        raise ClusterError(
            f"the Ray cluster at {address} cannot be used from this machine: {_line(error)}. Make this "
            f"machine one of it (`.venv/bin/ray start --address={address} --num-cpus=0`), and set "
            "RAY_AUTH_TOKEN where the cluster has a token"
        ) from error


def require_listening(settings: RaySettings) -> None:
    """Refuse an address at which nobody listens, at once; Ray itself would try for minutes.

    Raises:
        ClusterError: Nobody does.
    """
    address = settings.address
    assert address is not None  # `ray_settings` has filled it in
    host, port = host_port(address)
    try:
        socket.create_connection((host, port), min(settings.connect_s, 10.0)).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): start one with `.venv/bin/ray start --head "
            f"--port={port}`, or name another in RAY_ADDRESS or in launchers.toml, [launcher.ray] address"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


@contextmanager
def shared_place(
    directory: Path, settings: RaySettings, *, gpus: float = 0.0, sources: bool = True
) -> Iterator[Place]:
    """Make sure that every machine of the cluster sees a directory, and has this code; yields the proof.

    Machines that join later are asked by each piece of work that comes to them.

    Args:
        directory: On the file system that all share.
        settings: How long to wait for an answer.
        gpus: That a piece of work needs.
        sources: Whether the work runs from what its machine imports, which then has to be the same.

    Raises:
        ClusterError: A machine does not, or no machine has what a piece of work needs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    able = [
        node
        for node in nodes
        if node["Resources"].get("CPU", 0.0) >= settings.cpus and node["Resources"].get("GPU", 0.0) >= gpus
    ]
    if not able:
        raise ClusterError(
            f"no machine of the Ray cluster at {settings.address} has {settings.cpus:g} cores"
            + (f" and {gpus:g} GPUs" if gpus else "")
            + f" ({len(nodes)} machines): start one with `.venv/bin/ray start --address={settings.address}`"
            + (", or ask for fewer with [launcher.ray] cpus" if settings.cpus > 1 else "")
        )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".ray-probe-{uuid.uuid4().hex}"
    place = Place(str(path), uuid.uuid4().hex, code_here(sources=sources))
    path.write_text(place.content, encoding="utf-8")
    try:
        ask = ray.remote(num_cpus=0, max_retries=0)(_asked)
        asked = {
            ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(place): node
            for node in able
        }
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=settings.connect_s)
        wrong = [f"{_name(asked[each])} did not answer within {settings.connect_s:g} s" for each in silent]
        for each in answered:
            try:
                if (said := ray.get(each)) is not None:
                    wrong.append(f"{_name(asked[each])} {said}")
            except Exception as error:
                wrong.append(f"{_name(asked[each])} {unanswered(error)}")
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ClusterError(
                f"not every machine of the Ray cluster can work here: {'; '.join(sorted(wrong)[:_SHOWN])}"
                f"{more}. Store, checkout and .venv have the same path everywhere, on a file system that all "
                "share, and Ray is started from that .venv (docs/clusters.md)"
            )
        yield place
    finally:
        path.unlink(missing_ok=True)


def unanswered(error: Exception) -> str:
    """Say why a piece of work gave no answer of its own."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ModuleNotFoundError):
        return f"has no {cause.name}: its Ray runs from another environment"
    return f"gave no answer: {type(cause).__name__}: {_line(cause)}"


def as_raised(error: Exception, what: str) -> Exception:
    """Return an error of a piece of work as it was raised there; one of Ray's own in a line.

    Args:
        error: As it came back.
        what: The piece of work.
    """
    from ray.exceptions import RayError

    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception) and not isinstance(cause, RayError):
        return cause
    return WorkerError(f"{what} {unanswered(error)}") if isinstance(error, RayError) else error


def _asked(place: Place) -> str | None:
    return place.wrong()


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def here() -> str:
    """Name this machine as a cluster with several raylets on one host does."""
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def died(error: Exception) -> bool:
    """Whether a piece of work ended because its process or its machine did."""
    from ray import exceptions

    kinds = (
        exceptions.ActorDiedError,
        exceptions.ActorUnavailableError,
        exceptions.LocalRayletDiedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
    )
    return isinstance(error, kinds)


def leave() -> None:
    """Let go of the cluster: what this driver had running there is ended."""
    import ray

    with contextlib.suppress(Exception):
        ray.shutdown()
    sys.stdout.flush()
