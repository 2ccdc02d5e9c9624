"""What Dagster's own events remember of records: a witness that lies outside the store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe_assets.lineage.witnesses import Sighting

if TYPE_CHECKING:
    from dagster import DagsterInstance

VERSION_TAG = "vpmoe/version"
"""Of a materialisation: the version that it is about."""
LATEST = 2
"""Materialisations of each asset that are asked for by default: the one of this run, and the one before."""


def told_by_dagster(instance: "DagsterInstance", experiment: str, limit: int = LATEST) -> Iterator[Sighting]:
    """Yield the records that the latest materialisations of an experiment's assets name.

    Args:
        instance: Of Dagster.
        experiment: Name.
        limit: How many materialisations of each asset are asked for.
    """
    for key in instance.get_asset_keys(prefix=[experiment]):
        for event in instance.fetch_materializations(key, limit=limit).records:
            told = event.asset_materialization
            if told is None or (version := (told.tags or {}).get(VERSION_TAG)) is None:
                continue
            record = told.metadata.get("record_digest")
            yield Sighting(
                "Dagster",
                experiment,
                key.path[-1],
                version,
                record_digest=None if record is None else str(record.value),
                digest=(told.tags or {}).get("dagster/data_version"),
            )


@contextmanager
def instance_at(home: Path) -> "Iterator[DagsterInstance]":
    """Open the Dagster instance of a directory with a `dagster.yaml`, or of Dagster's defaults.

    Relative paths in its configuration are those of this directory's project.

    Raises:
        FileNotFoundError: There is no instance: opening it would make one.
    """
    from dagster import DagsterInstance

    if not any((home / name).exists() for name in ("dagster.yaml", "history", "storage")):
        raise FileNotFoundError(f"DAGSTER_HOME = {home} holds no instance")
    before = os.getcwd()
    os.chdir(home)  # where .env has Dagster's commands started, and its storage is relative to
    try:
        with DagsterInstance.from_config(str(home)) as instance:
            yield instance
    finally:
        os.chdir(before)
