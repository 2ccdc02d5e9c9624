"""The health of routers: how evenly tokens are spread over the experts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


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
