"""Both donors' checkpoints: configuration, expected tensors, and seeded weights of the same architecture."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.contract.donor import HF_EMBEDDING, HF_FINAL_NORM, HF_HEAD, Shapes, donor_shapes
from trainer.contract.json_text import parse_json
from trainer.contract.schema.sources import HubDonor, HubVocabulary, SeededDonor, SeededVocabulary
from vpmoe_assets.donors import tokenizers
from vpmoe_assets.donors.tensors import read_header, require_tensors, save_bfloat16, seeded_normal
from vpmoe_assets.errors import DonorError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"

_FILE_NAME = re.compile(r"\w[\w.\-]*", re.ASCII)
"""Of a file in the directory of the index: no other one is anybody's weights."""

_BRANCH = 0.05
"""Scale of a seeded layer's output beside embeddings of 0.02."""

_LEAN = 0.02
"""How far the first token's seeded embedding leans in the direction of frequent tokens, per dimension."""

_HALVED_AT = 2048
"""Id of the token that leans half as far."""


def qwen3_config(donor: SeededDonor | HubDonor) -> dict[str, Any]:
    """`config.json` of a Qwen3 model, with the keys of the published one."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "head_dim": donor.head_dim,
        "hidden_act": "silu",
        "hidden_size": donor.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": donor.intermediate_size,
        "max_position_embeddings": 40_960,
        "max_window_layers": donor.num_layers,
        "model_type": donor.model_type,
        "num_attention_heads": donor.num_attention_heads,
        "num_hidden_layers": donor.num_layers,
        "num_key_value_heads": donor.num_key_value_heads,
        "rms_norm_eps": donor.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": donor.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": donor.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": donor.vocab_size,
    }


def gpt_oss_config(vocabulary: SeededVocabulary) -> dict[str, Any]:
    """`config.json` of a GPT-OSS model without layers: of such a donor only the vocabulary is used."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "bos_token_id": 199_998,
        "eos_token_id": 200_002,
        "head_dim": vocabulary.hidden_size,
        "hidden_size": vocabulary.hidden_size,
        "intermediate_size": vocabulary.hidden_size,
        "layer_types": [],
        "model_type": "gpt_oss",
        "num_attention_heads": 1,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 0,
        "num_key_value_heads": 1,
        "num_local_experts": 1,
        "pad_token_id": 199_999,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary.vocab_size,
    }


def write_seeded_qwen3(donor: SeededDonor, seed: int, directory: Path) -> None:
    """Write a Qwen3-architecture checkpoint with seeded weights and the real Qwen3 tokenizer.

    It is no trained model, but like one where a conversion can go wrong. Projections have the variance of
    their fan-in and the norms' gains differ from one, so a converter that scrambles heads or drops a gain
    changes the output; a layer adds about a quarter to the residual stream, so tokens stay distinct to the
    end. Embeddings lean in one direction, the more the earlier the token's id: earlier ids are more frequent,
    so the model predicts better than chance and what a conversion costs shows in its loss.

    Args:
        donor: Its geometry.
        seed: Of the experiment.
        directory: To fill.
    """
    branches = (2 * donor.num_layers) ** -0.5

    def draw(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        if len(shape) == 1:
            return np.float32(1.0) + seeded_normal(seed, name, shape, 0.1)
        if name in (HF_EMBEDDING, HF_HEAD):
            return seeded_normal(seed, name, shape, 0.02) + _frequency_lean(seed, shape)
        narrowed = _BRANCH * branches if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        return seeded_normal(seed, name, shape, narrowed * shape[1] ** -0.5)

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: draw(name, shape) for name, shape in donor_shapes(donor).items()}
    save_bfloat16(tensors, directory / WEIGHTS_NAME)
    write_json(directory / CONFIG_NAME, qwen3_config(donor))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": 151_643, "eos_token_id": [151_645, 151_643], "pad_token_id": 151_643},
    )
    write_json(directory / tokenizers.TOKENIZER_CONFIG_NAME, tokenizers.qwen3_tokenizer_config())
    (directory / tokenizers.TOKENIZER_NAME).write_bytes(tokenizers.qwen3_tokenizer_json())


def _frequency_lean(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return what each row adds along one seeded direction of signs: less, the larger its number."""
    rows, width = shape
    signs = np.sign(seeded_normal(seed, "frequency direction", (width,), 1.0))
    height = np.float32(_LEAN) / (
        np.float32(1.0) + np.arange(rows, dtype=np.float32) / np.float32(_HALVED_AT)
    )
    return height[:, None] * signs


def write_seeded_gpt_oss(
    vocabulary: SeededVocabulary, seed: int, ranks: Mapping[bytes, int], directory: Path
) -> None:
    """Write a GPT-OSS-architecture checkpoint of embedding and head alone, with the real o200k tokenizer.

    Args:
        vocabulary: Width and rows.
        seed: Of the experiment.
        ranks: Of o200k_base.
        directory: To fill.
    """
    shape = (vocabulary.vocab_size, vocabulary.hidden_size)
    directory.mkdir(parents=True, exist_ok=True)
    save_bfloat16(
        {
            HF_EMBEDDING: seeded_normal(seed, f"gpt_oss/{HF_EMBEDDING}", shape, 0.02),
            HF_FINAL_NORM: np.ones(vocabulary.hidden_size, dtype=np.float32),
            HF_HEAD: seeded_normal(seed, f"gpt_oss/{HF_HEAD}", shape, 0.02),
        },
        directory / WEIGHTS_NAME,
    )
    write_json(directory / CONFIG_NAME, gpt_oss_config(vocabulary))
    write_json(directory / tokenizers.TOKENIZER_CONFIG_NAME, tokenizers.o200k_tokenizer_config())
    (directory / tokenizers.TOKENIZER_NAME).write_bytes(tokenizers.o200k_tokenizer_json(ranks))


def require_qwen3(donor: SeededDonor | HubDonor, directory: Path) -> None:
    """Refuse a checkpoint whose configuration or tensors are not those of the experiment's donor.

    Raises:
        DonorError: Naming each key, what was found and what is expected.
    """
    config = read_config(directory)
    rope = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    expected = {
        "model_type": (config.get("model_type"), donor.model_type),
        "num_hidden_layers": (config.get("num_hidden_layers"), donor.num_layers),
        "rope_theta": (rope, donor.rope_theta),
        "hidden_act": (config.get("hidden_act"), "silu"),
        "attention_bias": (config.get("attention_bias"), False),
        "use_sliding_window": (config.get("use_sliding_window", False), False),
        **{
            name: (config.get(name), getattr(donor, name))
            for name in (
                "hidden_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "intermediate_size",
                "vocab_size",
                "tie_word_embeddings",
                "rms_norm_eps",
            )
        },
    }
    _refuse_differences(expected, directory, "sources.qwen3_0_6b")
    found = checkpoint_shapes(directory)
    if donor.tie_word_embeddings:  # some checkpoints store the tied head a second time
        found.pop(HF_HEAD, None)
    require_tensors(found, donor_shapes(donor), str(directory))


def require_vocabulary(vocabulary: SeededVocabulary | HubVocabulary, directory: Path) -> None:
    """Refuse a vocabulary donor whose embeddings or configuration are not those of the experiment.

    Raises:
        DonorError: Naming each key, what was found and what is expected.
    """
    config = read_config(directory)
    expected = {
        "model_type": (config.get("model_type"), "gpt_oss"),
        "hidden_size": (config.get("hidden_size"), vocabulary.hidden_size),
        "vocab_size": (config.get("vocab_size"), vocabulary.vocab_size),
    }
    _refuse_differences(expected, directory, "sources.gpt_oss_20b")
    shape = (vocabulary.vocab_size, vocabulary.hidden_size)
    found = checkpoint_shapes(directory)
    found.pop(HF_FINAL_NORM, None)
    require_tensors(found, {HF_EMBEDDING: shape, HF_HEAD: shape}, str(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        DonorError: It is absent or not JSON.
    """
    path = directory / CONFIG_NAME
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DonorError(f"{path}: not a readable configuration ({error})") from error


def weight_files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint, of one shard or of many.

    Raises:
        DonorError: A shard is missing, or index and shards disagree.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        return dict.fromkeys(read_header(directory / WEIGHTS_NAME), directory / WEIGHTS_NAME)
    files = {name: directory / file for name, file in read_weight_map(index).items()}
    for path in sorted(set(files.values())):
        stored = set(read_header(path))
        stated = {name for name, file in files.items() if file == path}
        if stored != stated:
            odd = sorted(stored ^ stated)
            raise DonorError(f"{index} and {path.name} disagree on {len(odd)} tensors ({', '.join(odd[:3])})")
    return files


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index of a checkpoint of many shards names it.

    Raises:
        DonorError: It is no such index.
    """
    try:
        found = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) and _FILE_NAME.fullmatch(file) for file in found.values()):
            return dict(found)
        raise TypeError("weight_map names no files of its own directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DonorError(f"{index} is no index of weights ({error!r}); download it again") from error


def checkpoint_shapes(directory: Path) -> Shapes:
    """Name and shape of every tensor that a checkpoint stores.

    Raises:
        DonorError: As `weight_files`.
    """
    files = weight_files(directory)
    headers = {path: read_header(path) for path in set(files.values())}
    return {name: headers[path][name].shape for name, path in files.items()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file in one fixed form."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_differences(pairs: Mapping[str, tuple[Any, Any]], directory: Path, key: str) -> None:
    wrong = [
        f"{name}: {found!r} found, {want!r} expected"
        for name, (found, want) in pairs.items()
        if found != want
    ]
    if wrong:
        raise DonorError(f"{directory / CONFIG_NAME} is not the model of {key}: {'; '.join(wrong)}")
