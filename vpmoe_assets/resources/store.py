"""The artifact store as a Dagster resource."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import store_root
from vpmoe_assets.resources.disk import disk_trouble
from vpmoe_assets.resources.event_log import hold_open
from vpmoe_assets.resources.hangup import end_with_terminal
from vpmoe_assets.resources.instances import MisplacedInstanceError, require_lasting
from vpmoe_assets.resources.reaping import close_dead_runs, end_dead_jobs
from vpmoe_assets.resources.run_record import record_run


class StoreResource(dg.ConfigurableResource):
    """Opens the store of one directory tree."""

    root: str = Field(
        default_factory=lambda: str(store_root()),
        description="Directory of all artifacts; by default $VPMOE_ARTIFACTS.",
    )

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Record which process executes the run, and do for killed ones what `vpmoe reap` does.

        Every step that makes an artifact has this resource, and Dagster sets it up before the first step of a
        run and before it waits for a slot in a pool.

        Raises:
            dagster.Failure: The run would be recorded in an instance that nobody finds again; or the store
                cannot be written to.
        """
        if context.run is None or context.instance is None or context.log is None:
            return  # opened outside a run
        try:
            require_lasting(context.instance)
        except MisplacedInstanceError as error:
            raise dg.Failure(str(error), allow_retries=False) from None
        root = Path(self.root)
        try:
            record_run(root, context.instance, context.run.run_id)
        except OSError as error:
            raise dg.Failure(f"{root}: {disk_trouble(error) or error}", allow_retries=False) from error
        hold_open(context.instance, context.run.run_id)
        end_with_terminal()
        end_dead_jobs(root, log=context.log.warning)
        close_dead_runs(root, context.log.warning)

    def open(self) -> Store:
        """Return the store."""
        return Store(Path(self.root))
