"""Donor to dense student: heads pooled, the FFN's largest neurons kept, everything else copied.

Neighbouring query heads are averaged into one, key and value heads too, and the output projection sums the
columns of the heads that became one. Where the heads of a pool are equal this is the donor's attention
exactly. The FFN changes its activation, from `silu(gate) · up` to `relu(up)²`, so it is an approximation:
`A` takes the neurons whose down projection is largest, `A+lsq` then refits the down projection to the
donor's outputs on a calibration text.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.contract.donor import HF_EMBEDDING, HF_FINAL_NORM, HF_HEAD, HF_LAYER
from trainer.contract.schema.rungs.vpdense import DenseRecipe
from trainer.model.qkv import interleave_qkv
from trainer.surgery.donor import require_donor
from trainer.surgery.step import Conversion, Outcome, Verdict
from trainer.surgery.tensors import EMBEDDING, FINAL_NORM, HEAD, LAYER, TORCH_DTYPES
from trainer.surgery.weights import WeightsReader, WeightsWriter

CHECK_TOKENS = 2048
"""Tokens of the calibration slice on which donor and result are compared."""

_COPIES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
"""Our name of a layer's tensor and the donor's."""


def pool_heads(weight: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Average neighbouring heads of a projection.

    Args:
        weight: `[donor heads · D, H]`, fp32.
        heads: Heads of the result; head j is the mean of the j-th of `heads` equal pools.
        head_dim: D.

    Returns:
        `[heads, D, H]`.
    """
    return weight.unflatten(0, (heads, -1, head_dim)).mean(dim=1)


def pool_columns(weight: torch.Tensor, heads: int, head_dim: int, how: str) -> torch.Tensor:
    """Merge the columns of an output projection that read neighbouring heads.

    The donor adds `Σ_h W_h o_h`; when the outputs of a pool become one, their columns must be added up, so
    `sum` keeps the function where the heads are equal, and `mean` divides the branch by the pool's size.

    Args:
        weight: `[H, donor heads · D]`, fp32.
        heads: Heads of the result.
        head_dim: D.
        how: `sum` or `mean`.

    Returns:
        `[H, heads · D]`.
    """
    pools = weight.unflatten(1, (heads, -1, head_dim))
    merged = pools.sum(dim=2) if how == "sum" else pools.mean(dim=2)
    return merged.flatten(1)


def keep_largest(down: torch.Tensor, count: int) -> torch.Tensor:
    """Return the neurons with the largest output weights (method A).

    Args:
        down: The down projection `[H, F]`, in fp32: neuron i writes column i into the residual stream.
        count: Neurons to keep.

    Returns:
        int64 `[count]`, increasing. Of equal norms the lower index wins; the order of neurons does not
        matter to the function.
    """
    norms = down.float().norm(dim=0)
    ranked = torch.sort(norms, descending=True, stable=True).indices
    return ranked[:count].sort().values


def convert(conversion: Conversion, out: WeightsWriter) -> Outcome:
    """Fill the dense student from the donor.

    Args:
        conversion: With a `DenseRecipe`.
        out: The student.
    """
    recipe = _recipe(conversion)
    surgery, model = recipe.surgery, recipe.architecture.model
    refits = surgery.ffn_method == "A+lsq"
    with WeightsReader(conversion.source) as source:
        require_donor(source, recipe.donor)
        out.write(EMBEDDING, source.read(HF_EMBEDDING))
        out.write(HEAD, source.read(HF_EMBEDDING if recipe.donor.tie_word_embeddings else HF_HEAD))
        out.write(FINAL_NORM, source.read(HF_FINAL_NORM))
        neurons: dict[int, torch.Tensor] = {}
        table: list[dict[str, Any]] = []
        for number in range(1, model.num_layers + 1):
            ours, theirs = LAYER.format(number - 1), HF_LAYER.format(number - 1)
            for name, donor_name in _COPIES.items():
                out.write(ours + name, source.read(theirs + donor_name))
            _write_attention(recipe, number, source, out)
            down = source.read_fp32(theirs + "mlp.down_proj.weight")
            neurons[number] = keep_largest(down, model.ffn_hidden_size)
            kept = down[:, neurons[number]]
            up = source.read(theirs + "mlp.up_proj.weight")
            out.write(ours + "mlp.linear_fc1.weight", up[neurons[number]])
            if not refits:
                out.write(ours + "mlp.linear_fc2.weight", surgery.ffn_scale * kept)
            for name in ("mlp.linear_fc1.bias", "mlp.linear_fc2.bias"):
                if ours + name in out.specs and not (refits and name == "mlp.linear_fc2.bias"):
                    out.write(ours + name, torch.zeros(out.specs[ours + name].shape))
            share = float(kept.square().sum() / down.square().sum())
            table.append({"layer": number, "kept_down_projection": share})
        if refits:
            _write_refits(conversion, recipe, source, out, neurons, table)
    transform = {
        "q_pool": recipe.donor.num_attention_heads // model.num_attention_heads,
        "kv_pool": recipe.donor.num_key_value_heads // model.num_query_groups,
        "o_proj_pool": surgery.o_proj_pool,
        "qkv_layout": "interleaved by query group",
        "ffn_method": surgery.ffn_method,
        "ffn_selection_method": "A_weight_norm",
        "ffn_scale": surgery.ffn_scale,
        "ffn_selection_indices": {str(number): kept.tolist() for number, kept in neurons.items()},
        "ffn_selection_hashes": {
            str(number): hashlib.sha256(",".join(map(str, kept.tolist())).encode()).hexdigest()
            for number, kept in neurons.items()
        },
    }
    return Outcome(transform=transform, layers=table)


def _write_attention(recipe: DenseRecipe, number: int, source: WeightsReader, out: WeightsWriter) -> None:
    model = recipe.architecture.model
    ours = LAYER.format(number - 1) + "self_attention."
    theirs = HF_LAYER.format(number - 1) + "self_attn."
    pooled = [
        pool_heads(source.read_fp32(theirs + f"{name}_proj.weight"), heads, model.head_dim).permute(2, 0, 1)
        for name, heads in (
            ("q", model.num_attention_heads),
            ("k", model.num_query_groups),
            ("v", model.num_query_groups),
        )
    ]  # [H, heads, D] each
    out.write(ours + "linear_qkv.weight", interleave_qkv(pooled[0], pooled[1], pooled[2]).t())
    columns = source.read_fp32(theirs + "o_proj.weight")
    merged = pool_columns(columns, model.num_attention_heads, model.head_dim, recipe.surgery.o_proj_pool)
    out.write(ours + "linear_proj.weight", merged)
    for name in ("linear_qkv.bias", "linear_proj.bias"):
        if ours + name in out.specs:
            out.write(ours + name, torch.zeros(out.specs[ours + name].shape))


def _write_refits(
    conversion: Conversion,
    recipe: DenseRecipe,
    source: WeightsReader,
    out: WeightsWriter,
    neurons: Mapping[int, torch.Tensor],
    table: list[dict[str, Any]],
) -> None:
    """Refit and write every layer's down projection, in one pass of the donor over the calibration text."""
    from trainer.surgery.calibration import load_calibration
    from trainer.surgery.refit import refit_layers
    from trainer.surgery.streams import DonorStream

    calibration = load_calibration(
        conversion.inputs[recipe.text],
        tokens=recipe.surgery.calibration_tokens,
        seq_len=recipe.architecture.attention.max_sequence_length,
        seed=conversion.seed,
    )
    conversion.check_stop()
    donor = DonorStream(conversion.source, source.read, calibration.batches(), device=conversion.device)
    with conversion.phase("refit", donor.layers, unit="layer") as tick:
        fits = refit_layers(
            donor, lambda number: _narrow(recipe, source, neurons, number), ridge=recipe.surgery.ffn_ridge
        )
        for number, fit in fits:
            prefix = LAYER.format(number - 1) + "mlp.linear_fc2."
            out.write(prefix + "weight", fit.weight)
            out.write(prefix + "bias", fit.bias)
            table[number - 1] |= {
                "ffn_relative_mse": fit.relative_mse_after,
                "ffn_relative_mse_before_refit": fit.relative_mse_before,
                "silent_neurons": fit.silent_neurons,
            }
            tick(f"layer {number}")


def _narrow(
    recipe: DenseRecipe, source: WeightsReader, neurons: Mapping[int, torch.Tensor], number: int
) -> Any:
    from trainer.surgery.refit import NarrowFfn

    prefix, kept = HF_LAYER.format(number - 1) + "mlp.", neurons[number]
    # As it will be stored, rounding included: that is what the refitted projection is fed with.
    fc1 = source.read(prefix + "up_proj.weight")[kept].to(TORCH_DTYPES[recipe.dtype]).float()
    fc2 = recipe.surgery.ffn_scale * source.read_fp32(prefix + "down_proj.weight")[:, kept]
    return NarrowFfn(fc1, None, fc2)


def check(conversion: Conversion, payload: Path, outcome: Outcome) -> None:
    """Run donor and result on the beginning of the calibration text.

    Adds to each row of the table the cosine of the residual streams and, where no refit has measured it, the
    error of the FFN relative to predicting zero; and two verdicts: finite logits, better than guessing.
    """
    from trainer.surgery.calibration import load_calibration
    from trainer.surgery.refit import refit_layers
    from trainer.surgery.streams import DonorStream, StudentStream, residual_agreement

    recipe = _recipe(conversion)
    tokens = min(CHECK_TOKENS, recipe.surgery.calibration_tokens)
    calibration = load_calibration(
        conversion.inputs[recipe.text],
        tokens=tokens,
        seq_len=recipe.architecture.attention.max_sequence_length,
        seed=conversion.seed,
    )
    batches = calibration.batches()
    neurons = {
        int(number): torch.tensor(kept) for number, kept in outcome.transform["ffn_selection_indices"].items()
    }
    layers = recipe.architecture.model.num_layers
    with WeightsReader(conversion.source) as source, WeightsReader(payload) as target:
        student = StudentStream(recipe.architecture, target.read, batches, device=conversion.device)
        donor = DonorStream(conversion.source, source.read, batches, device=conversion.device)
        with conversion.phase("compare", layers, unit="layer") as tick:
            for row in residual_agreement(student, donor):
                outcome.layers[int(row["layer"]) - 1] |= {
                    "cosine_to_donor": row["cosine"],
                    "norm_ratio_to_donor": row["norm_ratio"],
                }
                tick(f"layer {row['layer']}")
        if recipe.surgery.ffn_method == "A":
            again = DonorStream(conversion.source, source.read, batches, device=conversion.device)
            with conversion.phase("measure FFNs", layers, unit="layer") as tick:
                narrow = refit_layers(
                    again, lambda number: _narrow(recipe, source, neurons, number), ridge=0.0
                )
                for number, fit in narrow:
                    outcome.layers[number - 1] |= {"ffn_relative_mse": fit.relative_mse_before}
                    tick(f"layer {number}")
        entropy = student.cross_entropy(tokens)
    uniform = math.log(recipe.architecture.vocab_size)
    measured = {
        "cross_entropy": entropy if math.isfinite(entropy) else None,
        "ln_vocab_size": uniform,
        **calibration.describe(),
    }
    outcome.details["calibration"] = calibration.describe()
    outcome.checks["finite_logits"] = Verdict(
        math.isfinite(entropy),
        "cross-entropy on the calibration text, hence every logit, is finite",
        measured,
    )
    outcome.checks["better_than_guessing"] = Verdict(
        entropy < uniform, "cross-entropy on the calibration text is below ln V", measured
    )


def _recipe(conversion: Conversion) -> DenseRecipe:
    assert isinstance(conversion.recipe, DenseRecipe)
    return conversion.recipe
