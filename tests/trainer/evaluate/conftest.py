"""A tiny Hugging Face checkpoint with a byte-level tokenizer, made from a seed."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.evaluate.models import LanguageModel, open_model
from trainer.evaluate.tokenizers import byte_symbols

WORDS = ("the", "in", "er", "on", "at", " a", " t", "he", "re", "an", "nd", "is", " s", "or", "en", " the")


def write_tokenizer(directory: Path, *, bos: str | None = "<s>") -> int:
    """A byte-level BPE of 256 bytes, a few merges and two special tokens; returns its size."""
    symbols = byte_symbols()
    vocabulary = {symbols[byte]: byte for byte in range(256)}
    merges = []
    for word in WORDS:
        parts = [symbols[byte] for byte in word.encode()]
        joined = parts[0]
        for part in parts[1:]:
            if joined + part not in vocabulary:
                vocabulary[joined + part] = len(vocabulary)
                merges.append((joined, part))
            joined += part
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    if bos:
        config["bos_token"] = bos
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_llama(directory: Path, *, seed: int = 0, layers: int = 2, scale: float = 0.3) -> Path:
    """A Llama whose weights are large enough for its predictions to differ."""
    directory.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=scale,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(llama_dir: Path) -> LanguageModel:
    return open_model(llama_dir, name="llama")
