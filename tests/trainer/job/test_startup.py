"""Starting a job's process."""

import subprocess
import sys

LOADED = """
import torch
compile = torch.compile
from trainer.job.startup import load_megatron
load_megatron()
load_megatron()
assert torch.compile is compile, "the compiler is given back"
import sys
import trainer.train.run
from trainer.job.distributed import make_deterministic
make_deterministic(torch.device("cpu"))
assert torch.get_deterministic_debug_mode() == 1
for name in ("megatron.core", "torch._inductor.compile_fx", "torch._dynamo", "wandb"):
    print(name in sys.modules)
"""


def test_megatron_is_loaded_without_the_compiler_and_the_compiler_stays_available() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]
