"""Checks that checkpoints share: tensors, read again; what a conversion measured of itself; a healing run."""

from collections.abc import Mapping, Sequence

from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.donor import Donor
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.verdict import Verdict

_DIVERGED_NATS = 0.5
"""A healing run whose held-out loss ends this far above its start has diverged."""


def weights_complete(architecture: Architecture, dtype: str) -> Check:
    """Return the check that a published rung's files hold the tensors of an architecture."""

    @check("weights_complete")
    def complete(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """The files hold exactly the tensors of the recipe: names, shapes, types, one after the other."""
        from vpmoe_assets.donors.audit import rung_config_faults, rung_tensors, tensor_faults

        expected = rung_tensors(architecture, dtype)
        faults = [
            *tensor_faults(item.payload, expected),
            *rung_config_faults(item.payload, architecture, dtype),
        ]
        return Verdict.of(faults, f"{len(expected)} tensors, as the recipe says", {"tensors": len(expected)})

    return complete


def donor_weights_complete(donor: Donor, source: str) -> Check:
    """Return the check that a Hugging Face checkpoint's files hold the tensors of the donor's architecture.

    Args:
        donor: Geometry of the checkpoint.
        source: Input that it was made from, whose types it keeps.
    """

    @check("weights_complete")
    def complete(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """The files hold exactly the tensors of the recipe: names, shapes, types, one after the other."""
        from vpmoe_assets.donors.audit import donor_tensors, tensor_faults

        expected = donor_tensors(donor, inputs[source].payload)
        faults = tensor_faults(item.payload, expected)
        return Verdict.of(faults, f"{len(expected)} tensors, as the recipe says", {"tensors": len(expected)})

    return complete


def copied(
    name: str, description: str, source: str, pairs: Mapping[str, str], zeros: Sequence[str] = ()
) -> Check:
    """Return the check that tensors are the very numbers of the checkpoint that a rung was made from.

    Args:
        name: Of the check.
        description: What it holds the rung to.
        source: Input whose tensors are compared.
        pairs: Name of the source's tensor by the name of the rung's.
        zeros: Names of the tensors that are zero.
    """

    @check(name, description=description)
    def kept(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        from vpmoe_assets.donors.audit import copy_faults, zero_faults

        faults = [
            *copy_faults(item.payload, inputs[source].payload, pairs),
            *zero_faults(item.payload, zeros),
        ]
        zero = f", {len(zeros)} zero" if zeros else ""
        found = {"copied": len(pairs), "zero": len(zeros)}
        return Verdict.of(faults, f"{len(pairs)} tensors have the numbers of {source}{zero}", found)

    return kept


def measured(name: str, description: str, *, blocking: bool) -> Check:
    """Return the check that passes on what the conversion itself found, with the model or the tool at hand.

    It holds the conversion to its own finding, as recorded; what can be found out from the published files
    alone has a check that looks at them.
    """

    @check(name, blocking=blocking, description=f"{description} As the conversion found.")
    def found(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        finding = item.summary["checks"].get(name)
        if finding is None:
            raise EvidenceMissing(f"the conversion did not measure {name}")
        return Verdict(bool(finding["passed"]), str(finding["description"]), dict(finding["metadata"]))

    return found


def distance(name: str, column: str, description: str) -> Check:
    """Return the check that no layer's output points away from the source's."""

    @check(name, blocking=False, description=f"{description} As the conversion found.")
    def cosine(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        cosines = [row[column] for row in item.summary["layers"]]
        mean = sum(cosines) / len(cosines)
        return Verdict(
            min(cosines) > 0,
            f"cosine of the residual streams: mean {mean:.3f}, least {min(cosines):.3f}, "
            f"last {cosines[-1]:.3f}",
            {"mean": mean, "min": min(cosines), "last": cosines[-1]},
        )

    return cosine


@check(
    "loss_not_diverged",
    blocking=False,
    description=f"The held-out loss ends at most {_DIVERGED_NATS} nats above its start.",
)
def loss_not_diverged(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Compare the held-out loss at the end with that at the start."""
    found = item.summary
    start, end = found["heldout_loss_start"], found["heldout_loss_end"]
    return Verdict(
        end <= start + _DIVERGED_NATS,
        f"held-out loss {start:.3f} → {end:.3f} nats per token",
        {"start": start, "end": end, "uniform": found["uniform_loss"]},
    )
