"""The student's attention in place of the donor's: windows, tensor products, GRAPE, sinks, value residual.

Global layers keep their projection: ALiBi takes the place of RoPE, and has no tensor. Local layers get tensor
products fitted to the projection that they replace, on the parent's own inputs of each layer. What is new
starts from a constant: sinks low enough to take almost nothing, the value residual near the layer's own
values, GRAPE-M's frequencies at RoPE's. Everything else is copied bit for bit. The function changes: tensor
products are quadratic in their input, windows are narrow; the report says by how much, a short healing run
follows.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.contract.layers import layer_kinds
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.rungs.morph import MorphRecipe
from trainer.model.init import INIT_STD
from trainer.model.positions import initial_log_freq
from trainer.model.qkv import split_qkv
from trainer.model.value_residual import initial_logit
from trainer.surgery.als import fit_tensor_product, tensor_product_error
from trainer.surgery.calibration import Calibration, load_calibration
from trainer.surgery.step import Conversion, Outcome, Verdict
from trainer.surgery.streams import StudentStream, residual_agreement
from trainer.surgery.tensors import LAYER, LOG_FREQ
from trainer.surgery.weights import WeightsReader, WeightsWriter

CHECK_TOKENS = 1024
"""Tokens of the calibration slice on which parent and result are compared."""

PROJECTIONS = ("q", "k", "v")

_QKV = "self_attention.linear_qkv."
_TPA = "self_attention.linear_tpa."


def convert(conversion: Conversion, out: WeightsWriter) -> Outcome:
    """Write the morphed rung.

    Args:
        conversion: With a `trainer.config.MorphRecipe`; its inputs are the parent and the text.
        out: Receives every tensor of the result.

    Returns:
        The table of fit errors by layer; how the calibration slice was taken.

    Raises:
        ConfigError: The parent lacks a tensor that this step cannot make.
        DataError: The text is too short or damaged.
        WeightsError: The parent is not the rung that the recipe names.
        Interrupted: The job was asked to stop.
    """
    recipe = _recipe(conversion)
    with WeightsReader(conversion.source) as parent:
        parent.require_rung(recipe.parent, recipe.parent_dtype)
        copied, fitted = _plan(recipe, parent, out)
        calibration = _calibration(conversion, recipe)
        table = _write_fits(conversion, recipe, parent, out, calibration, fitted)
        made = [name for name in out.specs if name not in copied and _TPA not in name]
        for name in copied:
            out.write(name, parent.read(name))
        for name in made:
            out.write(name, _constant(name, recipe, out.specs[name].shape))
    transform: dict[str, Any] = {
        "calibration": calibration.describe(),
        "tpa_init": recipe.surgery.tpa_init,
        "fitted_layers": list(fitted),
        "copied_tensors": len(copied),
        "new_constants": sorted({name.rpartition(".")[2] for name in made}),
    }
    return Outcome(transform=transform, layers=table)


def check(conversion: Conversion, payload: Path, outcome: Outcome) -> None:
    """Run parent and result on the beginning of the calibration slice.

    Adds the cosine of the residual streams to each row of the table, and two verdicts: the logits are finite,
    and the cross-entropy is below that of guessing.

    Args:
        conversion: As for `convert`.
        payload: The result, read back.
        outcome: Of `convert`.
    """
    recipe = _recipe(conversion)
    batches = _calibration(conversion, recipe).batches(tokens=CHECK_TOKENS)
    with WeightsReader(conversion.source) as source, WeightsReader(payload) as target:
        parent, result = (
            StudentStream(architecture, reader.read, batches, device=conversion.device)
            for architecture, reader in ((recipe.parent, source), (recipe.architecture, target))
        )
        with conversion.phase("compare", result.layers, "layer") as tick:
            for row in residual_agreement(result, parent):
                number = int(row["layer"])
                outcome.layers[number - 1] |= {
                    "cosine_to_parent": row["cosine"],
                    "norm_ratio_to_parent": row["norm_ratio"],
                }
                tick(f"layer {number}")
        before, after = parent.cross_entropy(CHECK_TOKENS), result.cross_entropy(CHECK_TOKENS)
    uniform = math.log(recipe.architecture.vocab_size)
    measured = {
        "cross_entropy": _finite(after),
        "parent_cross_entropy": _finite(before),
        "ln_vocab_size": uniform,
        "tokens": sum(batch.tokens.numel() for batch in batches),
    }
    outcome.checks["finite_logits"] = Verdict(
        math.isfinite(after), "cross-entropy on the calibration text, hence every logit, is finite", measured
    )
    outcome.checks["better_than_guessing"] = Verdict(
        after < uniform, "cross-entropy on the calibration text is below ln V", measured
    )


def _recipe(conversion: Conversion) -> MorphRecipe:
    if not isinstance(conversion.recipe, MorphRecipe):
        raise ConfigError(f"step: found {conversion.recipe.step!r}; this step takes a 'morph' recipe")
    return conversion.recipe


def _calibration(conversion: Conversion, recipe: MorphRecipe) -> Calibration:
    return load_calibration(
        conversion.inputs[recipe.text],
        tokens=recipe.surgery.calibration_tokens,
        seq_len=recipe.architecture.attention.max_sequence_length,
        seed=conversion.seed,
    )


def _plan(
    recipe: MorphRecipe, parent: WeightsReader, out: WeightsWriter
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the tensors to copy, and numbers of the layers whose projection is replaced."""
    copied = tuple(name for name in out.specs if name in parent)
    fitted = tuple(
        number
        for number in range(1, recipe.architecture.model.num_layers + 1)
        if LAYER.format(number - 1) + _TPA + "a_q" in out.specs
        and LAYER.format(number - 1) + _QKV + "weight" in parent
    )
    replaced = {LAYER.format(number - 1) + _QKV + part for number in fitted for part in ("weight", "bias")}
    lost = sorted(set(parent.names) - set(copied) - replaced)
    made = {LAYER.format(number - 1) + _TPA + part for number in fitted for part in _factor_names()}
    started = ("softmax_offset", "value_residual_logit", "log_freq")
    unknown = [
        name
        for name in out.specs
        if name not in parent and name not in made and name.rpartition(".")[2] not in started
    ]
    if lost or unknown:
        raise ConfigError(
            "architecture: the morph makes tensor products from dense projections, sinks, value residuals "
            f"and frequencies; it has no rule for {len(unknown)} tensors of the result {unknown[:3]} and "
            f"would lose {len(lost)} of the parent {lost[:3]}"
        )
    return copied, fitted


def _factor_names() -> tuple[str, ...]:
    return (*(f"{factor}_{projection}" for projection in PROJECTIONS for factor in "ab"), "bias")


def _constant(name: str, recipe: MorphRecipe, shape: Sequence[int]) -> torch.Tensor:
    model, grape = recipe.architecture.model, recipe.architecture.grape
    if name == LOG_FREQ:
        assert grape.rotary_base is not None  # by the config
        return initial_log_freq(model.head_dim, grape.rotary_base, grape.grapem_log_freq_scale).expand(*shape)
    if name.endswith("value_residual_logit"):
        return torch.full(tuple(shape), initial_logit(model.value_residual_init, model.value_residual_eps))
    return torch.full(tuple(shape), recipe.surgery.softmax_offset_init)


def _write_fits(
    conversion: Conversion,
    recipe: MorphRecipe,
    parent: WeightsReader,
    out: WeightsWriter,
    calibration: Calibration,
    fitted: Sequence[int],
) -> list[dict[str, Any]]:
    """Fit and write the factors layer by layer while the parent runs; the table of the report."""
    kinds = layer_kinds(recipe.architecture)
    keys = ("relative_mse", "relative_mse_at_start", "sweeps")
    table: list[dict[str, Any]] = [
        {"layer": number, "kind": kind, **{f"{p}_{key}": None for p in PROJECTIONS for key in keys}}
        for number, kind in enumerate(kinds, start=1)
    ]
    stream = StudentStream(recipe.parent, parent.read, calibration.batches(), device=conversion.device)
    with conversion.phase("fit", len(PROJECTIONS) * len(fitted), "projection") as tick:
        for number in range(1, max(fitted, default=0) + 1):
            layer = stream.load(number)
            if number in fitted:
                inputs = _normalised(layer, stream)
                for projection, weight in _dense(parent, recipe, number).items():
                    values = _fit_projection(conversion, recipe, out, number, projection, weight, inputs)
                    table[number - 1] |= {f"{projection}_{key}": value for key, value in values.items()}
                    tick(f"layer {number}, {projection}")
                bias = LAYER.format(number - 1) + _TPA + "bias"
                if bias in out.specs:
                    out.write(bias, parent.read(LAYER.format(number - 1) + _QKV + "bias"))
                del inputs
            if number < max(fitted):
                stream.run(layer)
            conversion.check_stop()
    return table


@torch.no_grad()
def _normalised(layer: nn.Module, stream: StudentStream) -> list[torch.Tensor]:
    """Return the layer's inputs behind its norm, `[tokens, H]` for each batch."""
    norm = layer.get_submodule("input_layernorm")
    return [norm(hidden).flatten(0, 1) for hidden in stream.hidden]


def _dense(parent: WeightsReader, recipe: MorphRecipe, number: int) -> dict[str, torch.Tensor]:
    """Return the layer's projections from the interleaved matrix, each `[heads, D, H]`."""
    model = recipe.parent.model
    matrix = parent.read_fp32(LAYER.format(number - 1) + _QKV + "weight")
    parts = split_qkv(matrix.t(), model.num_query_groups, model.head_dim)  # [H, heads, D]
    return {name: part.permute(1, 2, 0).contiguous() for name, part in zip(PROJECTIONS, parts, strict=True)}


def _fit_projection(
    conversion: Conversion,
    recipe: MorphRecipe,
    out: WeightsWriter,
    number: int,
    projection: str,
    weight: torch.Tensor,
    inputs: list[torch.Tensor],
) -> dict[str, float | int | None]:
    """Make and write the two factors of one projection; what the table says of them."""
    names = {factor: f"{LAYER.format(number - 1)}{_TPA}{factor}_{projection}" for factor in "ab"}
    tpa, surgery = recipe.architecture.tpa, recipe.surgery
    rank = (tpa.tpa_q_rank if projection == "q" else tpa.tpa_rank) or 0  # set, by the config
    start: float | None = None
    sweeps: int | None = None
    if surgery.tpa_init == "als":
        fit = fit_tensor_product(
            inputs,
            weight,
            rank,
            sweeps=surgery.als_sweeps,
            tolerance=surgery.als_tolerance,
            generator=conversion.generator("morph", number, projection),
            on_sweep=lambda _sweep, _error: conversion.check_stop(),
        )
        factors = {"a": fit.a, "b": fit.b}
        start, sweeps = fit.errors[0], len(fit.errors) - 1
    else:
        factors = {
            factor: torch.empty(out.specs[name].shape).normal_(
                0.0, INIT_STD, generator=conversion.generator("morph", name)
            )
            for factor, name in names.items()
        }
    stored = {factor: tensor.to("cpu", out.specs[names[factor]].dtype) for factor, tensor in factors.items()}
    for factor, tensor in stored.items():
        out.write(names[factor], tensor)
    error = tensor_product_error(inputs, weight, stored["a"], stored["b"])
    return {"relative_mse": error, "relative_mse_at_start": start, "sweeps": sweeps}


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None
