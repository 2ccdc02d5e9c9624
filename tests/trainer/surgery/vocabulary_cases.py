"""Two checkpoints with different vocabularies of 2,000 tokens, and the job that gives one the other's."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.contract.donor import donor_shapes
from trainer.contract.schema.base import parse
from trainer.contract.schema.donor import Donor
from trainer.contract.schema.job import Job
from vpmoe_assets.donors.tensors import save_bfloat16, seeded_normal

TOKENS = 2000
SOURCE_ROWS = 2016
RESULT_ROWS = 2048
HIDDEN, OTHER_HIDDEN = 24, 40
LAYERS, HEADS, PAIRS, DIM, WIDTH = 2, 4, 2, 8, 12
K = 8


def train_tokenizer(texts: list[str], special: list[str], size: int = TOKENS) -> Tokenizer:
    """A byte-level BPE tokenizer whose ids are its ranks, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def english() -> list[str]:
    return [topics[name] for name in sorted(topics) if len(name) % 2]


def mixed() -> list[str]:
    """Other English, and words outside ASCII that the first vocabulary cannot have as tokens."""
    foreign = "größer für häßlich Привет мир 你好世界 こんにちは naïveté café "
    return [topics[name] for name in sorted(topics) if len(name) % 2 == 0] + [foreign * 200]


def write_donor(directory: Path, *, tied: bool = False) -> Tokenizer:
    """A Qwen3 checkpoint over the first vocabulary."""
    directory.mkdir(parents=True)
    geometry = parse(Donor, vocabulary_recipe(tied=tied)["donor"])
    tokenizer = train_tokenizer(english(), ["<|pad|>", "<|im_end|>", "<think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    save_bfloat16(
        {name: values(name, shape) for name, shape in donor_shapes(geometry).items()},
        directory / "model.safetensors",
    )
    write_json(
        directory / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 5,
            "eos_token_id": TOKENS - 2,
            "head_dim": DIM,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "max_position_embeddings": 512,
            "model_type": "qwen3",
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": PAIRS,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "vocab_size": SOURCE_ROWS,
        },
    )
    write_json(
        directory / "tokenizer_config.json",
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
            "bos_token": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(directory / "generation_config.json", {"eos_token_id": TOKENS - 2, "temperature": 0.6})
    return tokenizer


def write_vocabulary(directory: Path, seed: int = 2) -> Tokenizer:
    """A GPT-OSS checkpoint of embedding and head over the second vocabulary."""
    directory.mkdir(parents=True)
    tokenizer = train_tokenizer(mixed(), ["<|pad|>", "<|return|>", "<|start|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    shape = (TOKENS, OTHER_HIDDEN)
    save_bfloat16(
        {name: values(name, shape, seed) for name in ("model.embed_tokens.weight", "lm_head.weight")},
        directory / "model.safetensors",
    )
    write_json(
        directory / "config.json",
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_size": OTHER_HIDDEN,
            "vocab_size": TOKENS,
            "eos_token_id": TOKENS - 2,
            "pad_token_id": TOKENS - 3,
        },
    )
    write_json(
        directory / "tokenizer_config.json",
        {
            "eos_token": "<|return|>",
            "pad_token": "<|pad|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    return tokenizer


def values(name: str, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return seeded_normal(seed, name, shape, 0.5)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def vocabulary_recipe(*, tied: bool = False, vocab_size: int = RESULT_ROWS, **surgery: Any) -> dict[str, Any]:
    return {
        "step": "vocabulary",
        "source": "qwen3_0_6b",
        "donor": {
            "model_type": "qwen3",
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": PAIRS,
            "head_dim": DIM,
            "intermediate_size": WIDTH,
            "vocab_size": SOURCE_ROWS,
            "tie_word_embeddings": tied,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
        },
        "vocabulary": "gpt_oss_20b",
        "vocabulary_hidden_size": OTHER_HIDDEN,
        "vocab_size": vocab_size,
        "surgery": {"tool": "mergekit-tokensurgeon", "approximation_method": "omp", "k": K} | surgery,
    }


def vocabulary_job(root: Path, donor: Path, vocabulary: Path, recipe: dict[str, Any]) -> Job:
    return parse(
        Job,
        {
            "schema": "vpmoe.job/1",
            "command": "convert",
            "asset": "qwen3_0_6b_o200k",
            "experiment": "test",
            "recipe": recipe,
            "recipe_fingerprint": "f" * 8,
            "seed": 11,
            "inputs": {
                "qwen3_0_6b": {"path": str(donor), "digest": "a"},
                "gpt_oss_20b": {"path": str(vocabulary), "digest": "b"},
            },
            "execution": {"device": "cpu"},
            "provenance": {"git_sha": "0", "git_dirty": False, "source_digest": "0", "lock_digest": "0"},
            "work_dir": str(root / "work"),
            "output_dir": str(root / "output"),
        },
    )
