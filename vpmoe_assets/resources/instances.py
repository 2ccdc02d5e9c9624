"""The Dagster instance that a run belongs to, found again by another process in another environment.

`DAGSTER_HOME` of the shell says where the next run goes, not where the last one went. So a run that is to be
closed after a crash carries its instance with it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from dagster._core.instance import InstanceRef

_THROW_AWAY = ".tmp_dagster_home_"  # how Dagster's commands name the instance that they remove as they end


class InstanceUnavailableError(RuntimeError):
    """An instance cannot be opened, or not be written to; the message names it."""


class MisplacedInstanceError(RuntimeError):
    """What a run would leave in this instance would not be found again; the message says what to do."""


@dataclass(frozen=True)
class InstanceIdentity:
    """Enough to open an instance from anywhere on this machine.

    Attributes:
        root: Its directory, absolute; for people, and to see whether it is still there.
        reference: Dagster's own serialised reference to it, without relative paths. Values that its
            configuration takes from the environment are not in it.
    """

    root: str
    reference: Mapping[str, Any]

    @classmethod
    def of(cls, instance: "DagsterInstance") -> Self | None:
        """Return the identity of an instance; None for one that lives in memory and dies with its process."""
        from dagster import serialize_value

        if not instance.is_persistent:
            return None
        reference = json.loads(serialize_value(_without_relative_paths(instance.get_ref())))
        return cls(os.path.abspath(instance.root_directory), reference)

    @contextmanager
    def open(self) -> "Iterator[DagsterInstance]":
        """Open it.

        Raises:
            InstanceUnavailableError: It is gone, or its storage does not answer.
        """
        from dagster import DagsterInstance, deserialize_value
        from dagster._core.instance import InstanceRef

        if not Path(self.root).is_dir():  # opening would make an empty one in its place
            raise InstanceUnavailableError(f"there is no Dagster instance at {self.root} any more")
        try:
            reference = deserialize_value(json.dumps(self.reference), InstanceRef)
            with DagsterInstance.from_ref(reference) as instance:
                yield instance
        except Exception as error:  # each kind of storage fails in its own way, when opened or when used
            raise InstanceUnavailableError(f"the Dagster instance at {self.root}: {error}") from error


def close_run(instance: "DagsterInstance", run_id: str, why: str) -> bool:
    """Mark a run failed whose process is gone, and free the pool slots that it would hold for ever.

    Returns:
        Whether it was marked by this call; False for one that had ended or that Dagster has forgotten.
    """
    run = instance.get_run_by_id(run_id)
    unfinished = run is not None and not run.is_finished
    if run is not None and unfinished:
        instance.report_run_failed(run, why)
    if instance.event_log_storage.supports_global_concurrency_limits:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return unfinished


def require_lasting(instance: "DagsterInstance") -> None:
    """Refuse an instance of Dagster's commands in which a run would be recorded for nobody.

    Raises:
        MisplacedInstanceError: It is removed when the command ends, or lies wherever that was started.
    """
    if not instance.is_persistent:  # made by a program for itself
        return
    root, home = instance.root_directory, os.environ.get("DAGSTER_HOME")
    remedy = "Run `make setup`, which writes .env, and start commands in the project's root"
    if Path(root).name.startswith(_THROW_AWAY):
        raise MisplacedInstanceError(
            f"Dagster would throw the history of this run away ({root}): there is no DAGSTER_HOME. {remedy}, "
            "or set DAGSTER_HOME."
        )
    if home and not os.path.isabs(root) and Path.cwd().resolve() != Path(home).resolve():
        raise MisplacedInstanceError(
            f"DAGSTER_HOME is {home}, whose dagster.yaml keeps its storage at {root}, relative to where a "
            f"command is started; this one was started in {Path.cwd()}. {remedy}."
        )


def _without_relative_paths(reference: "InstanceRef") -> "InstanceRef":
    """Return a reference that means the same in every working directory."""
    from dagster._serdes import ConfigurableClassData

    changed = {}
    for name, part in reference._asdict().items():
        config = part.config_dict if isinstance(part, ConfigurableClassData) else None
        if isinstance(config, dict) and isinstance(config.get("base_dir"), str):
            absolute = config | {"base_dir": os.path.abspath(config["base_dir"])}
            changed[name] = part._replace(config_yaml=json.dumps(absolute))  # JSON is YAML
    return reference._replace(**changed)
