"""What present code and recipe would make: the steps of the code location, for verbs that compare with them.

The code location is loaded by name, as Dagster loads it. No verb imports it, so that those which only look at
the store answer in half a second.
"""

import contextlib
import dataclasses
import os
import runpy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import user_errors

if TYPE_CHECKING:
    from vpmoe_assets.lineage.remembered import Present
    from vpmoe_assets.lineage.staleness import PresentStep
    from vpmoe_assets.lineage.store import Store

CODE_LOCATION = "vpmoe_assets.definitions"


def load_steps(experiment: str) -> "tuple[str, dict[str, PresentStep]]":
    """Return the name of an experiment and what makes each of its assets, in the order of the graph.

    Args:
        experiment: A name, or the path of its TOML file.
    """
    loaded = load_location(experiment)
    return loaded["experiment"].name, loaded["steps"]


def load_location(experiment: str) -> dict[str, Any]:
    """Return the names that the code location defines under an experiment.

    Args:
        experiment: A name, or the path of its TOML file.

    Raises:
        ClickException: There is no such experiment, or it cannot be used as written.
    """
    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import experiment_file
    from vpmoe_assets.codebase.syntax import SourceError

    with user_errors(ConfigError):
        experiment_file(experiment)  # before Dagster is loaded for nothing
    before = os.environ.get("VPMOE_EXPERIMENT")
    os.environ["VPMOE_EXPERIMENT"] = experiment
    try:
        with user_errors(ConfigError, SourceError, SyntaxError):
            return runpy.run_module(CODE_LOCATION)
    except (ImportError, NameError, AttributeError, TypeError, LookupError) as error:  # of code being edited
        raise click.ClickException(
            f"the code location does not load: {type(error).__name__}: {error}; "
            f"`dagster definitions validate -m {CODE_LOCATION}` shows where"
        ) from error
    finally:
        if before is None:
            del os.environ["VPMOE_EXPERIMENT"]
        else:
            os.environ["VPMOE_EXPERIMENT"] = before


def present_of(experiment: str) -> "Present":
    """Return what makes the assets of an experiment now: as remembered, else the code location is loaded.

    Args:
        experiment: A name, or the path of its TOML file.

    Raises:
        ClickException: There is no such experiment, or it cannot be used as written.
    """
    from vpmoe_assets import project
    from vpmoe_assets.codebase.tree import current
    from vpmoe_assets.errors import DataError
    from vpmoe_assets.lineage.remembered import Present, RememberedStep, StepMemory, present_key

    memory = StepMemory(project.store_root() / ".work" / "steps.json")
    key = present_key(current(), experiment)
    if (known := memory.recall(key)) is not None:
        return known
    loaded = load_location(experiment)
    steps, fixed = loaded["steps"], True
    for step in steps.values():
        with contextlib.suppress(DataError):
            fixed &= not (step.external and step.external())
    present = Present(
        loaded["experiment"].name,
        loaded["experiment"].strict_toolchain,
        {
            asset: RememberedStep(asset, step.identity, step.closure, tuple(step.inputs), tuple(step.partial))
            for asset, step in steps.items()
        },
    )
    if not fixed:  # a folder is read whenever it is asked for
        return dataclasses.replace(present, steps=steps)
    memory.keep(key, present)
    return present


def step_of(steps: "Mapping[str, PresentStep]", experiment: str, asset: str) -> "PresentStep":
    """Return what makes an asset.

    Raises:
        ClickException: Nothing in the experiment does.
    """
    if asset not in steps:
        raise unknown_asset(asset, steps, experiment)
    return steps[asset]


def unknown_asset(asset: str, known: Collection[str], experiment: str) -> click.ClickException:
    """Return the error that an experiment has no such asset, with the nearest one."""
    import difflib

    near = difflib.get_close_matches(asset, known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; it has: {', '.join(known)}"
    return click.ClickException(f"experiment {experiment} makes no asset {asset!r}{hint}")


def present_identity(
    step: "PresentStep", store: "Store", experiment: str
) -> tuple[str, dict[str, Any]] | list[str]:
    """Return the fingerprint, and its payload, that an asset made now would have.

    Args:
        step: That makes it.
        store: With the latest artifacts that it would be made from.
        experiment: Name.

    Returns:
        Both, or the names of the inputs that were never published.
    """
    digests: dict[str, str] = {}
    missing: list[str] = []
    for name in (*step.inputs, *step.partial):
        head = store.latest(experiment, name)
        if head is not None:
            digests[name] = head.digest
        elif name not in step.partial:
            missing.append(name)
    return missing or step.fingerprint_of(digests)
