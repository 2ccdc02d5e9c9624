"""The ladder of an experiment as a small table: what each checkpoint is, and what it scores."""

from collections.abc import Sequence
from typing import Any

from vpmoe_assets.evaluation.names import eval_name
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.store import Store

COLUMNS = ("CHECKPOINT", "LAYERS", "PARAMETERS", "VALID LOSS", "TEXT NLL", "CORE-8")
_OWN = ("num_layers", "parameters", "valid_loss")
_MEASURED = ("ppl/text/nll", "core8/centered_mean")


def ladder_rows(store: Store, experiment: str, checkpoints: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return a row for each checkpoint that is there; None where a number is not.

    Args:
        store: With the artifacts.
        experiment: Name.
        checkpoints: In the order of the ladder.
    """
    rows = []
    for asset in checkpoints:
        own = _metrics(store, experiment, asset)
        if own is not None:
            measured = _metrics(store, experiment, eval_name(asset)) or {}
            numbers = [*map(own.get, _OWN), *map(measured.get, _MEASURED)]
            rows.append((asset, *map(_shown, numbers)))
    return rows


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _metrics(store: Store, experiment: str, asset: str) -> dict[str, Any] | None:
    try:
        head = store.latest(experiment, asset)
    except RecordError:
        return None
    return None if head is None else dict(head.metrics)
