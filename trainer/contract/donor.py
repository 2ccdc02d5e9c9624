"""Names and shapes of the tensors that a checkpoint of the dense donor stores."""

from trainer.contract.schema.donor import Donor

HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"
HF_FINAL_NORM = "model.norm.weight"
HF_LAYER = "model.layers.{}."
"""Prefix of a layer's tensors; the index counts from 0."""

Shapes = dict[str, tuple[int, ...]]


def donor_shapes(donor: Donor) -> Shapes:
    """Name and shape of every tensor of a Qwen3 checkpoint; a tied head has none of its own."""
    hidden, width, dim = donor.hidden_size, donor.intermediate_size, donor.head_dim
    queries, pairs = donor.num_attention_heads * dim, donor.num_key_value_heads * dim
    shapes: Shapes = {HF_EMBEDDING: (donor.vocab_size, hidden), HF_FINAL_NORM: (hidden,)}
    if not donor.tie_word_embeddings:
        shapes[HF_HEAD] = (donor.vocab_size, hidden)
    for layer in range(donor.num_layers):
        inside: Shapes = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (pairs, hidden),
            "self_attn.v_proj": (pairs, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (dim,),
            "self_attn.k_norm": (dim,),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }
        shapes |= {f"{HF_LAYER.format(layer)}{name}.weight": shape for name, shape in inside.items()}
    return shapes
