"""One tokenizer for all tests of the data path, and small SYNTH-shaped inputs."""

from pathlib import Path

import pytest

from trainer.contract.scaffold import Scaffold
from vpmoe_assets.harmony.render import Renderer
from vpmoe_assets.harmony.tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("o200k")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def renderer(tokenizer_dir) -> Renderer:
    return Renderer(tokenizer_dir)


@pytest.fixture(scope="session")
def scaffold() -> Scaffold:
    return Scaffold()
