"""Checks of the store of a teacher's scores: thin adapters over the audit of the library."""

from collections.abc import Mapping

from trainer.contract.schema.sources import ServerTeacher, TeacherSource
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.verdict import Verdict

_DATA = "synth_kd_v1"


@check("shards_verify")
def shards_verify(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Every block of the store has its checksum, and every shard its sha256."""
    from vpmoe_assets.harmony import topk_audit

    return topk_audit.shards_verify(item.payload)


def bound_to_inputs(source: TeacherSource) -> Check:
    """Return the check that the store says what it was made from."""

    @check("bound_to_inputs")
    def bound(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """The store names the data set, the tokenizer and the teacher that it was made from."""
        from vpmoe_assets.harmony import topk_audit

        data = inputs[_DATA]
        if isinstance(source, ServerTeacher):
            teacher = {"model": source.model, "revision": source.revision}
        else:
            teacher = {"digest": inputs["teacher"].record.digest}
        return topk_audit.bound_to(
            item.payload,
            dataset_digest=data.record.digest,
            tokenizer_sha256=data.manifest["tokenizer"]["model_sha256"],
            teacher={**teacher, "reasoning_mode": source.reasoning_mode},
        )

    return bound


@check("one_record_per_token")
def one_record_per_token(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Every supervised token of a scored conversation has one record, of its own label."""
    from vpmoe_assets.harmony import topk_audit

    return topk_audit.one_record_per_token(item.payload, inputs[_DATA].payload, inputs[_DATA].manifest)


@check("mass_at_most_one")
def mass_at_most_one(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Kept ids and tail of every token are a distribution: their mass is 1 at most, no id is there twice."""
    from vpmoe_assets.harmony import topk_audit

    return topk_audit.mass_at_most_one(item.payload, inputs[_DATA].payload, inputs[_DATA].manifest)


def coverage(subset_fraction: float) -> Check:
    """Return the check that the scored conversations are those of the subset."""

    @check("coverage")
    def covered(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Exactly those conversations are scored that the hash of their tokens selects, and all of valid."""
        from vpmoe_assets.harmony import topk_audit

        data = inputs[_DATA]
        return topk_audit.subset_rule_holds(
            item.payload, data.payload, data.manifest, fraction=subset_fraction
        )

    return covered
