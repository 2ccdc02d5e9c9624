"""A code location with one asset that launches a stand-in job, for tests that cancel real runs.

What the job does comes from `CANCEL_JOB` in the environment. The GPUs are two invented ones: a lease is files
only.
"""

import functools
import json
import os

import dagster as dg

from vpmoe_assets.project import ROOT
from vpmoe_assets.resources import launcher
from vpmoe_assets.resources.launchers import local
from vpmoe_assets.resources.leases import Gpu, lease
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource

FAKE_GPUS = [Gpu("GPU-fake-0", "Invented"), Gpu("GPU-fake-1", "Invented")]
local.lease = functools.partial(lease, gpus=lambda: FAKE_GPUS)

FINGERPRINT = "f" * 64
JOB = json.loads(os.environ["CANCEL_JOB"])
launcher.PROGRAM = JOB["program"]


@dg.asset(pool="gpu")
def slow_checkpoint(
    context: dg.AssetExecutionContext, store: StoreResource, trainer: TrainerResource
) -> dg.MaterializeResult:
    with store.open().work_area("test", "slow_checkpoint", FINGERPRINT) as work:
        result = trainer.run(
            context,
            command=JOB["command"],
            asset="slow_checkpoint",
            experiment="test",
            recipe=JOB["recipe"],
            recipe_fingerprint=FINGERPRINT,
            seed=1,
            inputs={name: (path, "d" * 64) for name, path in JOB["inputs"].items()},
            provenance={"git_sha": "0" * 40, "git_dirty": False, "source_digest": "s", "lock_digest": "l"},
            sources=ROOT,
            work_dir=work.path,
            output_dir=work.output,
        )
    return dg.MaterializeResult(metadata={"summary": result.summary})


defs = dg.Definitions(
    assets=[slow_checkpoint],
    resources={
        "store": StoreResource(),
        "trainer": TrainerResource(
            device=JOB["device"],
            nproc=JOB["nproc"],
            dp=JOB["nproc"],
            wandb="disabled",
            grace_s=240.0,
            poll_s=0.2,
        ),
    },
    executor=dg.in_process_executor,
)
