"""The rungs of an experiment, in the order in which one is made from another; a new rung is one line here."""

from collections.abc import Mapping
from typing import Any, get_args

from trainer.contract.schema.base import ConfigError, NamedTables, parse
from trainer.contract.schema.rungs.expand import DeepRung
from trainer.contract.schema.rungs.morph import MorphedRung
from trainer.contract.schema.rungs.rung import ConversionRecipe, Rung, RungConfig
from trainer.contract.schema.rungs.upcycle import MoeRung
from trainer.contract.schema.rungs.vocabulary import VocabularyRung
from trainer.contract.schema.rungs.vpdense import CompatRung


class Rungs(NamedTables):
    """The `[rungs]` tables by asset name, first to last."""

    qwen3_0_6b_o200k: VocabularyRung | None = None
    vpdense0_5_28: CompatRung | None = None
    vpdense_28: MorphedRung | None = None
    vpdense_80: DeepRung | None = None
    vpmoe: MoeRung


def _table(annotation: Any) -> type[Rung]:
    """Return the table's class of an optional or required rung."""
    return next(
        kind
        for kind in (*get_args(annotation), annotation)
        if isinstance(kind, type) and issubclass(kind, Rung)
    )


_TABLES = {asset: _table(field.annotation) for asset, field in Rungs.model_fields.items()}

WITHOUT_GEOMETRY = frozenset(asset for asset, table in _TABLES.items() if not issubclass(table, RungConfig))
"""Rungs whose geometry is the donor's: `[rungs.defaults]` is not for them."""

RECIPES: dict[str, type[ConversionRecipe]] = {
    table.RECIPE.model_fields["step"].default: table.RECIPE for table in _TABLES.values()
}
"""The recipe of each step, by its word, in the order of the ladder."""


def parse_convert_recipe(raw: Mapping[str, Any], *, origin: str = "recipe") -> ConversionRecipe:
    """Validate the recipe of a `convert` job.

    Raises:
        ConfigError: The step is missing or unknown, or a key of that step's recipe is.
    """
    step = raw.get("step")
    allowed = ", ".join(map(repr, RECIPES))
    if step is None:
        raise ConfigError(f"step: missing; allowed: {allowed}", origin=origin)
    if not isinstance(step, str) or step not in RECIPES:
        raise ConfigError(f"step: found {step!r}; allowed: {allowed}", origin=origin)
    return parse(RECIPES[step], raw, origin=origin)
