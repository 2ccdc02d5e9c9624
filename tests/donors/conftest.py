from pathlib import Path

import pytest

from trainer.contract.schema.sources import SeededDonor, SeededVocabulary
from vpmoe_assets.donors.checkpoints import write_seeded_gpt_oss, write_seeded_qwen3
from vpmoe_assets.harmony.tokenizer import load_ranks, write_tokenizer

SEED = 7

DONOR = SeededDonor(
    kind="seeded",
    tokenizer="qwen3",
    model_type="qwen3",
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=12,
    vocab_size=151_936,
    tie_word_embeddings=True,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
VOCABULARY = SeededVocabulary(kind="seeded", hidden_size=8, vocab_size=201_088)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, int]:
    directory = tmp_path_factory.mktemp("o200k")
    write_tokenizer(directory)
    return load_ranks(directory)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("donors") / "qwen3"
    write_seeded_qwen3(DONOR, SEED, directory)
    return directory


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> Path:
    directory = tmp_path_factory.mktemp("donors") / "gpt_oss"
    write_seeded_gpt_oss(VOCABULARY, SEED, ranks, directory)
    return directory
