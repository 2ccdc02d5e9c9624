"""Torch's `.metadata` is opened only if it names no code but torch's own for it."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.inputs import changed_bytes
from trainer.checkpoints.plain_metadata import UnsafePickleError, require_plain_metadata


class Running:
    """Runs a shell when it is opened."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint as torch writes it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    dcp.save(
        {"a": torch.zeros(3, dtype=torch.bfloat16), "b": {"c": torch.ones(2, 2)}, "step": 3},
        checkpoint_id=directory,
        no_dist=True,
    )
    return directory


def test_what_torch_writes_is_taken(written):
    require_plain_metadata(written)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_program_is_refused_unopened(tmp_path, protocol):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Running(f"touch {tmp_path / 'ran'}"), protocol))
    with pytest.raises(UnsafePickleError, match=r"\.metadata would run posix\.system"):
        require_plain_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["Metadata.__init__.__globals__", "load", "pickle"])
def test_a_path_through_what_is_harmless_leads_nowhere_else(tmp_path, name):
    module = b"torch.distributed.checkpoint.metadata" if "." in name else b"torch"
    content = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name.encode()
    (tmp_path / ".metadata").write_bytes(content + b"\x93.")
    with pytest.raises(UnsafePickleError, match="would run"):
        require_plain_metadata(tmp_path)


@settings(max_examples=25, database=None)
@given(st.data())
def test_damage_is_refused_by_one_error(written, tmp_path_factory, data):
    directory = Path(tmp_path_factory.getbasetemp()) / "damaged"
    directory.mkdir(exist_ok=True)
    content = data.draw(changed_bytes((written / ".metadata").read_bytes()))
    (directory / ".metadata").write_bytes(content)
    try:
        require_plain_metadata(directory)
    except UnsafePickleError as error:
        said = str(error)
        assert ".metadata" in said
