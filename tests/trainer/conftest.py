"""What holds for every test of the trainer."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state


@pytest.fixture(autouse=True, scope="module")
def no_group_of_another_module() -> None:
    """A worker runs many modules in one process; none begins in the process group that another one left."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
