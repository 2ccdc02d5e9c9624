"""Function preservation on two ranks, all cases in one pair of processes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.trainer.surgery.surgery_models import loaded, random_batch
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse


def compared(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs parent and result of each case; what this rank found."""
    dist.init_process_group("gloo")
    found = []
    for case in cases:
        logits = []
        with torch.no_grad():
            # A dense parent has no experts to spread.
            for side, ep in (("parent", 1), ("result", case["ep"])):
                parallel_state.initialize_model_parallel(
                    tensor_model_parallel_size=case["tp"],
                    expert_model_parallel_size=ep,
                    expert_tensor_parallel_size=1,
                )
                architecture = parse(Architecture, case[side]["architecture"])
                model = loaded(architecture, Path(case[side]["path"]), case["dtype"])
                logits.append([model(*random_batch(seed)) for seed in range(2)])
                parallel_state.destroy_model_parallel()
        before, after = (torch.stack(side) for side in logits)
        found.append(
            {
                "name": case["name"],
                "equal": torch.equal(before, after),
                "largest": float(before.abs().max()),
                "width": before.shape[-1],
            }
        )
    dist.destroy_process_group()
    return found
