"""Checks of the rungs: what a conversion measured of itself, and what can be seen in its files without it."""

from collections.abc import Mapping
from typing import Any

from trainer.contract.schema.convert import ConvertRecipe, DenseRecipe, UpcycleRecipe
from vpmoe_assets.build import Build, Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.verdict import Verdict

_DIVERGED_NATS = 0.5
"""A healing run whose held-out loss ends this far above its start has diverged."""


def summary(build: Build) -> dict[str, Any]:
    """Return what the job says of its deliverable."""
    import orjson

    return dict(orjson.loads((build.work.output / "summary.json").read_bytes()))


def measured(name: str, description: str, *, blocking: bool) -> Check:
    """Return the check that passes on what the conversion itself found, after it had read back its result."""

    @check(name, blocking=blocking, description=description)
    def found(build: Build, inputs: Mapping[str, Published]) -> Verdict:
        finding = summary(build)["checks"].get(name)
        if finding is None:
            return Verdict(False, f"the conversion did not measure {name}", {})
        return Verdict(bool(finding["passed"]), str(finding["description"]), dict(finding["metadata"]))

    return found


def conversion_checks(recipe: ConvertRecipe) -> list[Check]:
    """Return the checks of a rung that is made by a conversion.

    What would make everything below wrong is blocking; what only says how much was lost is not.
    """
    reload = measured("reload", "Every tensor, read back from its file, is what was computed.", blocking=True)
    if isinstance(recipe, UpcycleRecipe):
        return [reload, *_upcycle_checks(recipe)]
    return [reload, *_CHECKS[recipe.step](recipe)]


def _vocabulary_checks(recipe: Any) -> list[Check]:
    rows = (
        f"The embedding has {recipe.vocab_size} rows, as the configuration says; nothing else in it changed."
    )
    return [
        measured("vocabulary_rows", rows, blocking=True),
        measured(
            "shared_tokens_copied",
            "Tokens of both vocabularies have the donor's very row, bit for bit.",
            blocking=True,
        ),
        measured("rest_copied", "Every other tensor has the donor's bytes.", blocking=True),
        measured("new_rows", "A sample of the new rows, computed again.", blocking=False),
        measured("padding_rows", "Rows without a token are the mean row.", blocking=False),
        measured("numeric_prompts", "Numbers have their known o200k ids and decode back.", blocking=False),
    ]


def _dense_checks(recipe: DenseRecipe) -> list[Check]:
    return [
        interleave_identity(recipe),
        measured("finite_logits", "All logits on the calibration text are finite.", blocking=True),
        measured("better_than_guessing", "Cross-entropy on it is below ln V.", blocking=False),
        distance("distance_to_donor", "cosine_to_donor", "How far each layer's output is from the donor's."),
    ]


def _morph_checks(recipe: Any) -> list[Check]:
    return [
        measured("finite_logits", "All logits on the calibration text are finite.", blocking=True),
        measured("better_than_guessing", "Cross-entropy on it is below ln V.", blocking=False),
        tpa_fit,
        distance(
            "distance_to_parent", "cosine_to_parent", "How far each layer's output is from the parent's."
        ),
    ]


def _expand_checks(recipe: Any) -> list[Check]:
    return [
        measured("logits_bit_identical", "The deeper model's logits are its parent's bits.", blocking=True)
    ]


def _upcycle_checks(recipe: UpcycleRecipe) -> list[Check]:
    exact = recipe.surgery.routed_gain == 0.0
    name = "logits_bit_identical" if exact else "logits_finite"
    says = "The logits are the parent's bits." if exact else "All logits on a fixed batch are finite."
    return [
        measured(name, says, blocking=True),
        measured("router_entropy", "Fresh routers spread tokens over the experts.", blocking=False),
    ]


_CHECKS: dict[str, Any] = {
    "vocabulary": _vocabulary_checks,
    "vpdense": _dense_checks,
    "morph": _morph_checks,
    "expand": _expand_checks,
}


def distance(name: str, column: str, description: str) -> Check:
    """Return the check that no layer's output points away from the source's."""

    @check(name, blocking=False, description=description)
    def cosine(build: Build, inputs: Mapping[str, Published]) -> Verdict:
        cosines = [row[column] for row in summary(build)["layers"]]
        mean = sum(cosines) / len(cosines)
        return Verdict(
            min(cosines) > 0,
            f"cosine of the residual streams: mean {mean:.3f}, least {min(cosines):.3f}, "
            f"last {cosines[-1]:.3f}",
            {"mean": mean, "min": min(cosines), "last": cosines[-1]},
        )

    return cosine


@check("tpa_fit", blocking=False)
def tpa_fit(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Fitted tensor products are closer to the dense projections than zero is, in every layer."""
    rows = summary(build)["layers"]
    errors = {
        projection: [
            row[f"{projection}_relative_mse"]
            for row in rows
            if row.get(f"{projection}_relative_mse") is not None
        ]
        for projection in ("q", "k", "v")
    }
    means = {name: sum(values) / len(values) for name, values in errors.items() if values}
    if not means:
        return Verdict(True, "no projection was fitted; the factors are random", {})
    worst = max(max(values) for values in errors.values() if values)
    shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return Verdict(
        worst < 1.0,
        f"mean squared error relative to predicting zero: {shown}; worst layer {worst:.3f}",
        {**means, "worst": worst},
    )


def interleave_identity(recipe: DenseRecipe) -> Check:
    """Return the check that query, key and value rows lie where the model reads them.

    The pooled heads are computed here once more from the donor's files and looked for in each query group:
    its queries, its key, its value. A block-wise layout, which loads without complaint, fails.
    """

    @check("interleave_identity")
    def interleaved(build: Build, inputs: Mapping[str, Published]) -> Verdict:
        """Each query group holds its pooled queries, then its key, then its value."""
        import numpy as np

        from vpmoe_assets.donors.checkpoints import weight_files
        from vpmoe_assets.donors.tensors import read_float32

        donor, model = inputs[recipe.source].payload, recipe.architecture.model
        theirs, ours = weight_files(donor), weight_files(build.payload)
        groups, dim = model.num_query_groups, model.head_dim
        queries = model.num_attention_heads // groups
        worst = 0.0
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}.self_attn."
            name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
            stored = read_float32(ours[name], name).reshape(groups, queries + 2, dim, -1)
            for part, places in (("q", slice(0, queries)), ("k", slice(queries, -1)), ("v", slice(-1, None))):
                tensor = f"{prefix}{part}_proj.weight"
                heads = model.num_attention_heads if part == "q" else groups
                pooled = read_float32(theirs[tensor], tensor).reshape(heads, -1, dim, stored.shape[-1])
                expected = pooled.mean(axis=1).reshape(groups, -1, dim, stored.shape[-1])
                scale = float(np.abs(expected).max()) or 1.0
                worst = max(worst, float(np.abs(stored[:, places] - expected).max()) / scale)
        return Verdict(
            worst <= 2.0**-8,
            f"{model.num_layers} layers of {groups} groups: rows differ from the pooled heads by {worst:.2g}",
            {"worst": worst},
        )

    return interleaved


@check(
    "loss_not_diverged",
    blocking=False,
    description=f"The held-out loss ends at most {_DIVERGED_NATS} nats above its start.",
)
def loss_not_diverged(build: Build, inputs: Mapping[str, Published]) -> Verdict:
    """Compare the held-out loss at the end with that at the start."""
    found = summary(build)
    start, end = found["heldout_loss_start"], found["heldout_loss_end"]
    return Verdict(
        end <= start + _DIVERGED_NATS,
        f"held-out loss {start:.3f} → {end:.3f} nats per token",
        {"start": start, "end": end, "uniform": found["uniform_loss"]},
    )
