"""The donor in the student's shapes, still with the donor's attention: heads pooled, FFN cut.

Query and key-value heads are averaged in pools, their output columns summed, the QKV matrix interleaved by
query group; the FFN keeps its largest neurons under squared ReLU, its down projection refitted on calibration
text. RoPE, full attention, no sinks, no value residual.
"""

from collections.abc import Mapping

from trainer.contract.donor import HF_EMBEDDING, HF_FINAL_NORM, HF_HEAD, HF_LAYER
from trainer.contract.schema.rungs.vpdense import DenseRecipe
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.checks.rungs import copied, distance, measured, weights_complete
from vpmoe_assets.rung import RungAsset
from vpmoe_assets.verdict import Verdict


def checks(recipe: DenseRecipe) -> list[Check]:
    """Return the checks of the rung."""
    return [
        weights_complete(recipe.architecture, recipe.dtype),
        copied(
            "rest_copied",
            "Embedding, head and norms have the donor's numbers.",
            recipe.source,
            copies(recipe),
        ),
        interleave_identity(recipe),
        measured("finite_logits", "All logits on the calibration text are finite.", blocking=True),
        measured("better_than_guessing", "Cross-entropy on it is below ln V.", blocking=False),
        distance("distance_to_donor", "cosine_to_donor", "How far each layer's output is from the donor's."),
    ]


def copies(recipe: DenseRecipe) -> dict[str, str]:
    """Return the donor's tensor that each tensor is copied from, for those that are not pooled or cut."""
    head = HF_EMBEDDING if recipe.donor.tie_word_embeddings else HF_HEAD
    pairs = {
        "embedding.word_embeddings.weight": HF_EMBEDDING,
        "output_layer.weight": head,
        "decoder.final_layernorm.weight": HF_FINAL_NORM,
    }
    for layer in range(recipe.architecture.model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", HF_LAYER.format(layer)
        pairs |= {
            f"{ours}input_layernorm.weight": f"{theirs}input_layernorm.weight",
            f"{ours}pre_mlp_layernorm.weight": f"{theirs}post_attention_layernorm.weight",
            f"{ours}self_attention.q_layernorm.weight": f"{theirs}self_attn.q_norm.weight",
            f"{ours}self_attention.k_layernorm.weight": f"{theirs}self_attn.k_norm.weight",
        }
    return pairs


def interleave_identity(recipe: DenseRecipe) -> Check:
    """Return the check that query, key and value rows lie where the model reads them.

    The pooled heads are computed here once more from the donor's files and looked for in each query group:
    its queries, its key, its value. A block-wise layout, which loads without complaint, fails.
    """

    @check("interleave_identity")
    def interleaved(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        """Each query group holds its pooled queries, then its key, then its value."""
        import numpy as np

        from vpmoe_assets.donors.checkpoints import weight_files
        from vpmoe_assets.donors.tensors import read_float32

        donor, model = inputs[recipe.source].payload, recipe.architecture.model
        theirs, ours = weight_files(donor), weight_files(item.payload)
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


RUNG = RungAsset(checks=checks)
