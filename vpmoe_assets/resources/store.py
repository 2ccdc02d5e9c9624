"""The artifact store as a Dagster resource."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import store_root


class StoreResource(dg.ConfigurableResource):
    """Opens the store of one directory tree."""

    root: str = Field(
        default_factory=lambda: str(store_root()),
        description="Directory of all artifacts; by default $VPMOE_ARTIFACTS.",
    )

    def open(self) -> Store:
        """Return the store."""
        return Store(Path(self.root))
