"""Checks of a training run, over the trainer's own summary."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from vpmoe_assets.checks.check import Check, Verdict

if TYPE_CHECKING:
    from vpmoe_assets.assets.making import Build, Published


def _summary(build: "Build") -> dict[str, Any]:
    return dict(orjson.loads((build.work.output / "summary.json").read_bytes()))


def _resume_drift(build: "Build", inputs: Mapping[str, "Published"]) -> Verdict:
    summary = _summary(build)
    drift, details = summary["resume_drift"], summary["resume_check"] or {}
    if drift is None:
        return False, "the trainer did not repeat its last steps, so nothing is known", {}
    equal = drift == 0.0 and bool(details.get("state_equal"))
    return equal, f"largest difference after resuming: {drift:g}", details


def _router_alive(build: "Build", inputs: Mapping[str, "Published"]) -> Verdict:
    router = _summary(build)["router"] or {}
    if not router:
        return False, "the trainer reported no router health for a mixture of experts", {}
    active = router["moe/router_agg/experts_active_mean"]
    return active > 1, f"{active:.1f} experts active on average", router


def _loss_fell(build: "Build", inputs: Mapping[str, "Published"]) -> Verdict:
    summary = _summary(build)
    start, end = summary["heldout_loss_start"], summary["heldout_loss_end"]
    details = {"start": start, "end": end, "uniform": summary["uniform_loss"]}
    return end < start, f"held-out loss {start:.3f} → {end:.3f} nats per token", details


RESUME_DRIFT = Check(
    "resume_drift",
    _resume_drift,
    description="The last steps, repeated from their checkpoint, end in the same bits as the run itself.",
)
ROUTER_ALIVE = Check(
    "router_alive", _router_alive, description="The routers send tokens to more than one expert."
)
HELDOUT_LOSS_FELL = Check(
    "heldout_loss_fell",
    _loss_fell,
    blocking=False,
    description="Loss on the valid split is lower than before.",
)
