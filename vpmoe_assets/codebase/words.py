"""Which keys of a recipe name modules, and of which package: imports that no `import` statement shows.

Adding a word (a loss, a backend, a rung, a suite) changes nothing here. A new *kind* of word, or any other
import by a name computed at run time, gets its line; `tests/codebase/test_words.py` finds what is missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.contract.words import BACKENDS, OBJECTIVES

JOBS: Mapping[str, tuple[str, ...]] = {
    "convert": ("trainer.job.startup", "trainer.surgery.convert"),
    "evaluate": ("trainer.job.startup", "trainer.evaluate.evaluate"),
    "profile": ("trainer.job.startup", "trainer.profiling.profile"),
    "score": ("trainer.job.startup", "trainer.teacher.score"),
    "train": ("trainer.job.startup", "trainer.train.run"),
}
"""What a command of the trainer does, command line and life of the job apart."""

KEYS: Mapping[str, str] = {
    "training.backend": BACKENDS,
    "backend": BACKENDS,
    "objective": OBJECTIVES,
    "step": "trainer.surgery",
    "suites": "trainer.evaluate",
}
"""Package of the module or modules that a key of a job's recipe names."""

FOLLOWED: Mapping[str, str] = {
    "trainer.contract.words": "`LISTED`",
    "trainer.evaluate.suite": "`suites`, and the routers' suite where a checkpoint has experts",
    "trainer.losses.common.objective": "`objective`",
    "trainer.model.backend": "`training.backend` of a training, `backend` of an evaluation",
    "trainer.surgery.program": "runs another project's program, whose release is in the packages",
    "trainer.surgery.steps": "`step`",
    "trainer.train.inputs": "scored conversations, where a recipe has that table",
    "trainer.train.live": "the source of rollouts, where a recipe has that table",
}
"""Modules that import by a name computed at run time, each with where that name comes from."""

LISTED: Mapping[str, tuple[str, ...]] = {"trainer.contract.words": (BACKENDS, OBJECTIVES)}
"""Packages that a module imports to list the words in them, and no word."""

TABLES: Mapping[str, str] = {
    "rollouts": "trainer.train.on_policy",
    "scored": "trainer.train.scored_inputs",
}
"""What a training whose recipe has such a table consists of beside its words."""
ROUTER_SUITE = "trainer.evaluate.router_health"
"""Asked of checkpoints with experts, without a word in the recipe."""


def job_roots(command: str, recipe: Mapping[str, Any]) -> list[str]:
    """Return the modules that a job consists of: those of its command, and those that its recipe names."""
    return [*JOBS[command], *named_modules(recipe)]


def named_modules(recipe: Mapping[str, Any]) -> list[str]:
    """Return the modules that the recipe of a trainer's job names by their words, sorted."""
    found = {f"{package}.{word}" for key, package in KEYS.items() for word in _words(recipe, key)}
    found |= {module for table, module in TABLES.items() if recipe.get(table) is not None}
    for checkpoint in recipe.get("checkpoints", {}).values():
        architecture = checkpoint.get("architecture")
        if checkpoint["format"] == "megatron" and (architecture is None or architecture.get("moe")):
            found.add(ROUTER_SUITE)
    return sorted(found)


def _words(recipe: Mapping[str, Any], key: str) -> Iterator[str]:
    value: Any = recipe
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return
        value = value[part]
    if isinstance(value, str):
        yield value
    elif isinstance(value, Sequence):
        yield from value
