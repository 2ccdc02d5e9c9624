import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.trainer.train.train_jobs import write_conversations


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Other tests may have left a process group of their own; a training session makes and ends its own."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mock shards that no test may write to."""
    return write_conversations(tmp_path_factory.mktemp("synth_kd_v1"))


@pytest.fixture
def own_conversations(conversations: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(conversations, tmp_path / "data"))
