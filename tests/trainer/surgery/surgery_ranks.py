"""Function preservation on two ranks, all cases in one pair of processes: starting them costs the most.

Run as ``python surgery_ranks.py RANK DIRECTORY``. ``DIRECTORY/cases.pt`` names the checkpoints; each rank
leaves what it found in ``DIRECTORY/rank_<n>.json``.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from surgery_models import loaded, random_batch

from trainer.config import Architecture, parse


def main(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    found = []
    for case in json.loads((root / "cases.json").read_text()):
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
    (root / f"rank_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
