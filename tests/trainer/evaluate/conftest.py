"""Tiny checkpoints of both kinds, made from seeds; no test begins in another's process group."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.trainer.evaluate.evaluation_inputs import architecture, write_llama, write_ranks
from trainer.checkpoints.published import save_published
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.opening import open_model
from trainer.job.distributed import session
from trainer.model.gpt import build_model


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """No process group left by another test; what needs one makes it or asks for `group`."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def group(no_process_group: None) -> Iterator[None]:
    """A process group of one, as our own checkpoints need."""
    with session("cpu"):
        yield


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(llama_dir: Path) -> LanguageModel:
    return open_model(llama_dir, name="llama")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The o200k rank file, as the artifact holds it."""
    return write_ranks(tmp_path_factory.mktemp("o200k_tokenizer"))


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published MoE checkpoint of two layers over the real vocabulary."""
    directory = tmp_path_factory.mktemp("student") / "payload"
    with nullcontext() if dist.is_initialized() else session("cpu"):
        model = build_model(architecture(), seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)  # predictions that differ by more than round-off
        save_published(model, architecture(), directory)
    return directory


@pytest.fixture
def student(student_dir: Path, ranks: Path, group: None) -> LanguageModel:
    return open_model(student_dir, name="student", tokenizer=ranks)
