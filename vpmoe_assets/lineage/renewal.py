"""Published files under a record of their own: in another experiment, or as the latest version once more."""

from collections.abc import Iterable, Sequence

from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import Draft, InputRef, Origin, Record
from vpmoe_assets.lineage.standing import Finding
from vpmoe_assets.lineage.statements import KINDS, PROGRAM, Statement


def reissued(original: Record, inputs: Sequence[InputRef], blocking_checks: Sequence[str]) -> Draft:
    """Return the draft of a record that names the files of another.

    Everything in it says how the bytes were made, the Dagster run included, and is the original's; so are the
    scores of an evaluation, about the same content under the name that it has here. Of this place are its
    inputs, of equal digests, and the checks that it has to pass. `original` names who made the files, also
    where they were linked from a link.

    Args:
        original: Whose files they are.
        inputs: As they are named here.
        blocking_checks: Of the asset, as the code has them now.
    """
    fields = original.model_dump(
        include=set(Draft.model_fields) - {"inputs", "blocking_checks", "evals", "checks"}
    )
    here = {reference.role: reference for reference in inputs}
    renamed = {
        (given.asset, given.version): (here[given.role].asset, here[given.role].version)
        for given in original.inputs
        if given.role in here
    }
    evals = []
    for score in original.evals:
        asset, version = renamed.get(
            (score.object_asset, score.object_version), (score.object_asset, score.object_version)
        )
        evals.append(score.model_copy(update={"object_asset": asset, "object_version": version}))
    origin = original.original or Origin(
        experiment=original.experiment,
        asset=original.asset,
        version=original.version,
        record_digest=original.record_digest,
    )
    return Draft.model_validate(
        {
            **fields,
            "inputs": tuple(inputs),
            "blocking_checks": tuple(blocking_checks),
            "evals": tuple(evals),
            "original": origin,
        }
    )


def verdicts(found: Iterable[Finding], renewed: Record) -> list[Statement]:
    """Return the verdicts about the original as statements about the record that names its files.

    The files are the same, and each verdict names the version of the check that gave it. A waiver is a
    person's word about one record, and is not repeated.
    """
    origin = renewed.original
    reason = f"found on {version_name(origin)}, whose files these are" if origin else ""
    return [
        Statement.about(
            renewed,
            "verdict",
            {name: getattr(finding, name) for name in KINDS["verdict"]},
            reason=reason,
            author=PROGRAM,
        )
        for finding in found
        if finding.outcome != "undetermined"
    ]
