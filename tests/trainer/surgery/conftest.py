"""Every test begins without a process group, whoever ran before."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from megatron.core import parallel_state


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    yield
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
