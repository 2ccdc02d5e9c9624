"""A backend that exists for the length of a test, as a new module beside `reference` would."""

import sys
from pathlib import Path

import pytest

import trainer.model.backends as backends

NAME = "gathering"
SOURCE = '''
"""Every row with a copy of its expert's matrices; honours grouped_gemm."""

import torch

from trainer.model.backend import Backend
from trainer.model.config import squared_relu
from trainer.model.core_attention import ReferenceCoreAttention
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.experts import StackedExperts
from trainer.model.support_loss import chunked_support_loss

FUSIONS = ("grouped_gemm",)
KEEPS = ()


class GatheredExperts(StackedExperts):
    def apply_to_rows(self, rows, weights, counts):
        of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        inner = torch.einsum("nh,nfh->nf", rows, self.weight1[of_row])
        inner = squared_relu(inner if self.bias1 is None else inner + self.bias1[of_row])
        outer = torch.einsum("nf,nhf->nh", inner, self.weight2[of_row])
        return weights[:, None] * (outer if self.bias2 is None else outer + self.bias2[of_row])


BACKEND = Backend(
    core_attention=ReferenceCoreAttention,
    experts=GatheredExperts,
    loss=chunked_cross_entropy,
    support_loss=chunked_support_loss,
)
'''


def add_backend(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str = NAME, source: str = SOURCE) -> str:
    """Let `training.backend` name one more module, until the test ends."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(folder)])
    module = f"{backends.__name__}.{name}"
    monkeypatch.setitem(sys.modules, module, None)  # noted, so that the import is undone with the rest
    del sys.modules[module]
    return name
