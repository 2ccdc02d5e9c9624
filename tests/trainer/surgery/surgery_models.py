"""Published models in memory and tokens for them; free of transformers, which takes seconds to import."""

from pathlib import Path

import torch

from trainer.checkpoints.published import load_published
from trainer.contract.schema.architecture import Architecture
from trainer.model.gpt import VPGPTModel, build_model
from trainer.surgery.tensors import TORCH_DTYPES


def loaded(architecture: Architecture, directory: Path, dtype: str = "fp32") -> VPGPTModel:
    model = build_model(architecture, dtype=TORCH_DTYPES[dtype], seed=99).eval()
    load_published(model, directory, architecture=architecture)
    return model


def random_batch(
    seed: int = 0, rows: int = 2, length: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and document ids, two documents in the first row."""
    tokens = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions, documents = torch.arange(length).repeat(rows, 1), torch.zeros_like(tokens)
    positions[0, 15:] -= 15
    documents[0, 15:] = 1
    return tokens, positions, documents
