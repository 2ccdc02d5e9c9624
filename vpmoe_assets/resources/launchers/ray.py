"""One rank on a machine of a Ray cluster, a core or a GPU of it: shares of a teacher's scores.

Ray gives out cores and GPUs; nothing is leased here. What is started here is the job's driver, bound to the
orchestrator as a local job is: with it, the job in the cluster ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, override

from trainer.contract.schema.base import ConfigError
from vpmoe_assets.errors import DataError
from vpmoe_assets.resources.launcher import Launch, LaunchError
from vpmoe_assets.resources.launchers.local import BOUND_SIGNAL, LocalHandle, bound_to_parent
from vpmoe_assets.resources.leases import lease
from vpmoe_assets.resources.processes import Log
from vpmoe_assets.resources.ray.cluster import require_listening
from vpmoe_assets.resources.ray.placed import PLACED_NAME, placed
from vpmoe_assets.resources.ray.settings import RaySettings, ray_settings


@contextmanager
def reserve(launch: Launch, log: Log) -> Iterator["RayHandle"]:
    """Make sure that the cluster answers; see `vpmoe_assets.resources.launcher.Launcher`.

    Raises:
        LaunchError: The job has several ranks, Ray is not installed, or no cluster answers.
    """
    if launch.nproc != 1:
        raise LaunchError(
            f'launcher = "ray" starts jobs of one rank, and nproc = {launch.nproc}: use "local" or "slurm"'
        )
    try:
        settings = ray_settings(launch.settings, os.environ)
        require_listening(settings)
    except (ConfigError, DataError) as error:
        raise LaunchError(str(error)) from error
    holder = {"marker": launch.marker, "asset": f"{launch.experiment}/{launch.asset}", "pid": os.getpid()}
    (launch.work_dir / PLACED_NAME).unlink(missing_ok=True)
    with lease(0, holder=holder, wait_s=launch.wait_s, log=log) as none:
        handle = RayHandle(launch, none, settings=settings)
        try:
            yield handle
        finally:
            handle.where = placed(launch.work_dir)
            (launch.work_dir / PLACED_NAME).unlink(missing_ok=True)


@dataclass
class RayHandle(LocalHandle):
    """A job in the cluster, as its driver.

    Attributes:
        settings: Of the cluster.
        where: Where it ran, once that is over.
    """

    settings: RaySettings = field(kw_only=True)
    where: dict[str, Any] | None = None

    @property
    @override
    def devices(self) -> tuple[str, ...]:
        """Which GPUs of which machine the job has; empty on a CPU, and before it starts."""
        where = self.where or placed(self.launch.work_dir)
        if self.launch.device != "cuda" or where is None:
            return ()
        return tuple(f"{where['host']}:{gpu}" for gpu in str(where["gpus"]).split(",") if gpu)

    @property
    @override
    def waiting(self) -> bool:
        """Whether no machine has begun it: it waits for a core or a GPU, or is being started again."""
        return not (self.launch.work_dir / PLACED_NAME).exists()

    @property
    @override
    def forkable(self) -> bool:
        """False: it is a driver, which does not import what jobs do."""
        return False

    @override
    def command_line(self) -> list[str]:
        """Return the command line of the driver; it ends with the job's own."""
        launch = self.launch
        python, *_ = launch.trainer
        return [
            *bound_to_parent(launch, BOUND_SIGNAL),
            *(python, "-m", "vpmoe_assets.resources.ray.process"),
            *("--settings", self.settings.model_dump_json()),
            *("--work", str(launch.work_dir), "--cwd", str(launch.sources)),
            *("--gpus", str(int(launch.device == "cuda"))),
            *("--wait", str(launch.wait_s), "--grace", str(launch.grace_s), "--"),
            *launch.trainer,
        ]
