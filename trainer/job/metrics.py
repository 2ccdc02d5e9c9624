"""What a training run reports: `metrics.jsonl`, and the health of the routers."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import ArrayLike

Value = float | int | str | bool | None


class MetricsLog:
    """Appends one JSON object per logged step to `metrics.jsonl`.

    A resumed run starts from a checkpoint that may lie behind the last line written before a crash. Opening
    the log therefore drops the lines past that step (and a line torn by the crash), so that the file always
    tells the one run that led to the present state and no step stands in it twice.

    Args:
        path: The file.
        resume_step: Step of the checkpoint the run goes on from; 0 starts the file anew.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line, step in _lines(path) if step <= resume_step] if resume_step else []
        scratch = path.with_name(f".{path.name}.tmp")
        with scratch.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append `{"step": step, **values}` and flushes, so that a follower of the file sees it at once.

        Args:
            step: 1-based number of the optimizer step just taken; 0 for what is measured before the first.
            values: Flat mapping; floats must be finite (a run with a non-finite loss stops instead of
                logging it).

        Raises:
            ValueError: A value is NaN or infinite.
        """
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _lines(path: Path) -> list[tuple[str, int]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line a crash tore
        if line.endswith("\n"):
            found.append((line, int(step)))
    return found


def router_health(counts: ArrayLike, expert_bias: ArrayLike | None) -> dict[str, float]:
    """Health of one MoE layer's router over one global batch.

    With `n_e` tokens routed to expert e, `N = sum n_e` and `p_e = n_e / N`:

    * `cv_pct` = 100 · population standard deviation of n / mean of n
    * `entropy` = −Σ p_e ln p_e in nats, with p_e clipped at 1e-12 (at most ln E)
    * `max_load_pct` = 100 · max n / N (100/E when uniform)
    * `experts_active`, `dead_experts` = number of experts with and without a token
    * `bias_range` = max − min of the expert bias; absent when the layer has none

    A layer that saw no token has 0 everywhere and E dead experts.

    Args:
        counts: `[E]` routed-token counts summed over micro-batches and ranks.
        expert_bias: `[E]` selection bias, or None where it is disabled.
    """
    n = np.asarray(counts, dtype=np.float64)
    total = n.sum()
    if total > 0:
        share = np.maximum(n / total, 1e-12)
        health = {
            "cv_pct": 100.0 * float(n.std() / n.mean()),
            "entropy": float(-(share * np.log(share)).sum()),
            "max_load_pct": 100.0 * float(n.max() / total),
            "experts_active": float((n > 0).sum()),
            "dead_experts": float((n == 0).sum()),
        }
    else:
        health = dict.fromkeys(("cv_pct", "entropy", "max_load_pct", "experts_active"), 0.0)
        health["dead_experts"] = float(n.size)
    if expert_bias is not None:
        bias = np.asarray(expert_bias, dtype=np.float64)
        health["bias_range"] = float(bias.max() - bias.min())
    return health


def router_metrics(
    counts: ArrayLike,
    expert_bias: ArrayLike | None,
    layer_numbers: Sequence[int],
    *,
    per_layer: bool = False,
) -> dict[str, float]:
    """Router health of a whole model, under the names `moe/router_agg/*` and `moe/router/layer_{n}/*`.

    Args:
        counts: `[n_moe_layers, E]` routed-token counts of one global batch.
        expert_bias: `[n_moe_layers, E]`, or None where it is disabled.
        layer_numbers: 1-based numbers of the MoE layers, in the order of the rows.
        per_layer: Adds the values of every layer to the aggregates.

    Returns:
        Flat mapping of metric name to value; empty for a model without MoE layers.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if rows.size == 0:
        return {}
    if len(layer_numbers) != len(rows):
        raise ValueError(f"{len(rows)} rows of router counts for {len(layer_numbers)} MoE layers")
    biases = None if expert_bias is None else np.asarray(expert_bias, dtype=np.float64)
    layers = [router_health(row, None if biases is None else biases[i]) for i, row in enumerate(rows)]

    def column(name: str) -> np.ndarray:
        return np.array([layer[name] for layer in layers])

    metrics = {
        "moe/router_agg/mean_cv_pct": float(column("cv_pct").mean()),
        "moe/router_agg/std_cv_pct": float(column("cv_pct").std()),
        "moe/router_agg/mean_entropy": float(column("entropy").mean()),
        "moe/router_agg/min_entropy": float(column("entropy").min()),
        "moe/router_agg/mean_max_load_pct": float(column("max_load_pct").mean()),
        "moe/router_agg/dead_experts_count": float(column("dead_experts").sum()),
        "moe/router_agg/experts_active_mean": float(column("experts_active").mean()),
    }
    if biases is not None:
        metrics["moe/router_agg/expert_bias_range"] = float(biases.max() - biases.min())
    if per_layer:
        for number, layer in zip(layer_numbers, layers, strict=True):
            metrics.update({f"moe/router/layer_{number}/{name}": value for name, value in layer.items()})
    return metrics
