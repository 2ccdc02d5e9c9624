"""The DuckDB index as a Dagster resource."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import store_root


class IndexResource(dg.ConfigurableResource):
    """Keeps the index up to date with the records; it can be made again from them at any time."""

    path: str = Field(
        default_factory=lambda: str(store_root() / "index.duckdb"),
        description="The DuckDB file; by default beside the artifacts.",
    )

    def open(self) -> Index:
        """Return the index."""
        return Index(Path(self.path))

    def update(self, store: Store) -> str | None:
        """Take up what has changed; see `vpmoe_assets.lineage.index.Index.update`."""
        return self.open().update(store)
