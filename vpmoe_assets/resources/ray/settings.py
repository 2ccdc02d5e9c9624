"""How a Ray cluster is used: the table `[launcher.ray]`. None of it is part of what is made."""

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from trainer.contract.schema.base import ConfigError, Count, Frozen, PositiveFloat
from vpmoe_assets.resources.launcher import LauncherNotAvailableError
from vpmoe_assets.resources.launcher_settings import settings_of

ADDRESS_ENV = "RAY_ADDRESS"
DEFAULT_ADDRESS = "127.0.0.1:6379"


class RaySettings(Frozen):
    """The table `[launcher.ray]`.

    Attributes:
        address: Of the cluster's head, HOST:PORT; None takes `RAY_ADDRESS`, or else 127.0.0.1:6379. A token
            of the cluster's stands in `RAY_AUTH_TOKEN` or in the file that Ray reads, never here.
        node_ip: Address of this machine in the cluster, where it has several; None lets Ray find it.
        cpus: Cores that a shard, or a job, is given.
        retries: How often a shard, or a job, is begun again after its worker or its machine died.
        connect_s: Longest time to reach the cluster, and for each of its machines to answer, in seconds.
    """

    address: str | None = None
    node_ip: str | None = None
    cpus: PositiveFloat = 1.0
    retries: Count = 3
    connect_s: Annotated[float, Field(gt=0, le=3600)] = 60.0

    @field_validator("address")
    @classmethod
    def _check(cls, address: str | None) -> str | None:
        if address is not None:
            host_port(address)
        return address


def host_port(address: str) -> tuple[str, int]:
    """Return the parts of a cluster's address.

    Raises:
        ValueError: It is no such address; the message says what would be one.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or "@" in address or not (port.isascii() and port.isdecimal()):
        raise ValueError(
            f'address = "{address}": give HOST:PORT of the cluster\'s head, such as "10.0.0.1:6379"; the '
            "orchestrator runs on a machine of the cluster, so ray:// and other schemes have no use"
        )
    return host, int(port)


def ray_settings(asked: Mapping[str, Any], environment: Mapping[str, str]) -> RaySettings:
    """Return the settings of a run, with the address that is in force.

    Args:
        asked: What the run asks for, by key; it comes before `launchers.toml`.
        environment: Where `RAY_ADDRESS` and `VPMOE_LAUNCHERS` stand.

    Raises:
        ConfigError: A key or value is wrong.
        LauncherNotAvailableError: Ray is not installed.
    """
    settings = settings_of("ray", RaySettings, asked, environment)
    if importlib.util.find_spec("ray") is None:
        raise LauncherNotAvailableError(
            '"ray" was asked for, and the package ray is not installed: `make ray` adds it'
        )
    if settings.address is not None:
        return settings
    address = environment.get(ADDRESS_ENV) or DEFAULT_ADDRESS
    try:
        host_port(address)
    except ValueError as error:
        raise ConfigError(f"{ADDRESS_ENV}: {error}") from None
    return settings.model_copy(update={"address": address})
