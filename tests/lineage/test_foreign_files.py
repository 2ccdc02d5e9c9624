"""What may become an artifact: data of a known format, whole, and nothing that runs or leads elsewhere."""

import contextlib
import io
import os
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.lineage.fabricate import index_of
from vpmoe_assets.lineage.errors import AdoptionError
from vpmoe_assets.lineage.foreign_files import look

TENSORS = save({"a": np.ones((2, 3), np.float32)})


def table():
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), out)
    return out.getvalue()


def torch_file(**options):
    out = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, out, **options)
    return out.getvalue()


GOOD = {
    "checkpoint": {"model.safetensors": TENSORS, "config.json": b"{}", "README.md": b"# It"},
    "shards": {"train/x_tokens.bin": b"\x80\x04" + b"0" * 18, "train/x_tokens.idx": index_of()},
    "parquet": {"rows.parquet": table()},
    "json lines": {"rows.jsonl": b'{"a": 1}\n{"a": 2}\n', "o200k.tiktoken": b"IQ== 0\n"},
}
BAD = {
    "cut off": ({"model.safetensors": TENSORS[:-5]}, "model.safetensors is damaged"),
    "no parquet": ({"rows.parquet": table()[:-9]}, "is no parquet file, or is cut off"),
    "a name in no text": (
        {"rows.parquet": table().replace(b"text", b"\xd0ext")},
        "is no parquet file, or is cut",
    ),
    "no index": ({"x.idx": b"x" * 50, "x.bin": b""}, "is no index of an IndexedDataset"),
    "short index": ({"x.idx": index_of()[:-1], "x.bin": b""}, "its header says"),
    "index alone": ({"x.idx": index_of()}, "has no .bin beside it"),
    "elements alone": ({"x.bin": b"1234"}, "has no .idx beside it"),
    "bad line": ({"x.jsonl": b"{}\n{\n"}, "line 2: not valid JSON"),
    "bad JSON": ({"m.safetensors": TENSORS, "config.json": b"{"}, "config.json is no JSON"),
    "program": ({"m.safetensors": TENSORS, "run.exe": b"MZ"}, "of no format that is known"),
    "bytes as text": ({"m.safetensors": TENSORS, "notes.txt": b"a\0b"}, "is no text"),
    "texts alone": ({"notes.txt": b"a"}, "holds no data of a format"),
    "nothing": ({}, "holds no data of a format"),
}
PICKLES = {
    "torch.save, today's": ("model.pt", torch_file()),
    "torch.save, today's, by another name": ("model.weights", torch_file()),
    "torch.save, the former": ("pytorch_model.bin", torch_file(_use_new_zipfile_serialization=False)),
    "pickle by another name": ("rows.jsonl", pickle.dumps([1, 2], protocol=4)),
    "text pickle": ("old.pkl", pickle.dumps([1, 2], protocol=0)),
    "Lightning": ("last.ckpt", torch_file()),
}


def written(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("files", GOOD.values(), ids=GOOD)
def test_known_formats_are_taken(tmp_path, files):
    found = look(written(tmp_path, files))
    assert {each.path for each in found.payload} == files.keys()
    assert found.pickles == []


@pytest.mark.parametrize(("files", "said"), BAD.values(), ids=BAD)
def test_what_is_damaged_or_unknown_is_refused_by_name(tmp_path, files, said):
    with pytest.raises(AdoptionError, match=said):
        look(written(tmp_path, files))


@pytest.mark.parametrize(("name", "content"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_is_told_whatever_it_is_called(tmp_path, name, content):
    assert look(written(tmp_path, {name: content})).pickles == [name]


@given(content=st.binary(max_size=64), suffix=st.sampled_from([".safetensors", ".idx", ".parquet", ".json"]))
def test_any_bytes_are_taken_or_refused_in_a_sentence(tmp_path_factory, content, suffix):
    directory = tmp_path_factory.mktemp("any")
    (directory / f"x{suffix}").write_bytes(content)
    with contextlib.suppress(AdoptionError):  # any other error is a fault
        assert look(directory).pickles


def test_links_pipes_and_names_that_are_no_text_are_refused(tmp_path):
    written(tmp_path, {"inside/model.safetensors": TENSORS, "secret": b"x"})
    link = tmp_path / "inside" / "other.json"
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(AdoptionError, match=r"other.json is a symbolic link \(to .*secret\)"):
        look(tmp_path / "inside")
    link.unlink()
    (tmp_path / "inside" / "folder").symlink_to(tmp_path)
    with pytest.raises(AdoptionError, match="folder is a symbolic link"):
        look(tmp_path / "inside")
    (tmp_path / "inside" / "folder").unlink()
    os.mkfifo(tmp_path / "inside" / "pipe")
    with pytest.raises(AdoptionError, match="pipe is neither a file nor a directory"):
        look(tmp_path / "inside")


def test_what_the_trainer_leaves_is_taken_apart(tmp_path):
    files = {
        "payload/model.safetensors": TENSORS,
        "summary.json": b"{}",
        "metrics.jsonl": b"{}\n",
        "manifest.json": b"{}",
        "checkpoints/iter_1/common.pt": torch_file(),
    }
    found = look(written(tmp_path, files))
    assert [each.path for each in found.payload] == ["model.safetensors"]
    assert {each.path for each in found.run} == {"summary.json", "metrics.jsonl"}
    assert found.manifest is not None
    assert found.left == ("checkpoints",)


def test_a_zip_that_is_cut_off_is_no_data(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    with pytest.raises(AdoptionError, match="of no format that is known"):
        look(written(tmp_path, {"x.zip": out.getvalue()[:60]}))
