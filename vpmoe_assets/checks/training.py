"""Checks of a training run, over the trainer's own summary."""

from collections.abc import Mapping

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import check
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.verdict import Verdict


@check("resume_drift")
def resume_drift(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """The last steps, repeated from their checkpoint, end in the same bits as the run itself."""
    found = item.summary
    drift, details = found["resume_drift"], found["resume_check"] or {}
    if drift is None:
        raise EvidenceMissing("the trainer did not repeat its last steps, so nothing is known")
    equal = drift == 0.0 and bool(details.get("state_equal"))
    return Verdict(equal, f"largest difference after resuming: {drift:g}", details)


@check("router_alive")
def router_alive(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """The routers send tokens to more than one expert."""
    router = item.summary["router"] or {}
    if not router:
        raise EvidenceMissing("the trainer reported no router health for a mixture of experts")
    active = router["moe/router_agg/experts_active_mean"]
    return Verdict(active > 1, f"{active:.1f} experts active on average", router)


@check("heldout_loss_fell", blocking=False)
def heldout_loss_fell(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Loss on the valid split is lower than before."""
    found = item.summary
    start, end = found["heldout_loss_start"], found["heldout_loss_end"]
    details = {"start": start, "end": end, "uniform": found["uniform_loss"]}
    return Verdict(end < start, f"held-out loss {start:.3f} → {end:.3f} nats per token", details)
