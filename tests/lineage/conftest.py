"""Fixtures of the lineage library's tests."""

from pathlib import Path

import pytest

from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")
