"""What counts as input in a folder, for rows and for text, and what is refused by name."""

import os

import pytest

from tests.harmony.inputs import rows, write
from trainer.contract.schema.sources import TextFolder
from vpmoe_assets.commands.data import input_files as named_by_option
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.rows import inspect_inputs
from vpmoe_assets.input_files import input_files, matching_files
from vpmoe_assets.text.documents import folder

LEFT_BEHIND = (
    ".rows.parquet",
    "._rows.parquet",
    ".ipynb_checkpoints/rows-checkpoint.parquet",
    "deep/.git/rows.parquet",
    "__MACOSX/rows.parquet",
    "$RECYCLE.BIN/$R1.parquet",
    "@eaDir/rows.parquet",
)


@pytest.fixture
def littered(tmp_path):
    """A folder whose own name is hidden, with two inputs and what editors and systems leave beside them."""
    root = tmp_path / ".cache" / "rows"
    for name in (*LEFT_BEHIND, "b.parquet", "a.parquet", "deep/c.parquet", "notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_hidden_files_and_what_systems_keep_are_no_input_however_a_folder_is_named(littered):
    flat = [littered / "a.parquet", littered / "b.parquet"]
    every = [*flat, littered / "deep/c.parquet"]
    assert input_files(littered, (".parquet",), deep=False) == flat
    assert input_files(littered, (".parquet",), deep=True) == every
    assert matching_files(f"{littered}/*.parquet") == flat
    assert matching_files(f"{littered}/**/*.parquet") == every
    assert named_by_option([str(littered)]) == named_by_option([f"{littered}/*.parquet"]) == flat


def test_a_hidden_file_that_is_named_outright_is_taken(littered):
    hidden = littered / ".rows.parquet"
    assert named_by_option([str(hidden)]) == [hidden]
    assert matching_files(f"{littered}/.r*.parquet") == [hidden]
    assert matching_files(f"{littered}/__MACOSX/*") == [littered / "__MACOSX/rows.parquet"]


def test_text_that_is_hidden_is_no_document(tmp_path):
    for name in (".draft.txt", ".ipynb_checkpoints/d-checkpoint.txt", "._d.txt", "d.txt", "more/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a line"}\n')
    source = folder(TextFolder(kind="folder", path=str(tmp_path)))
    assert [file["name"] for file in source.identity["files"]] == ["d.txt", "more/e.jsonl"]
    assert next(document.doc_id for document in source.documents()) == "d.txt"


def test_a_link_is_read_and_one_that_leads_nowhere_is_refused_by_name(tmp_path):
    real = tmp_path / "elsewhere.bin"
    real.write_bytes(b"x")
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.parquet").symlink_to(real)
    assert input_files(root, (".parquet",), deep=False) == [root / "a.parquet"]
    (root / "b.parquet").symlink_to(tmp_path / "gone")
    for deep in (False, True):
        with pytest.raises(DataError, match=r"b\.parquet is a link that leads nowhere: mend or remove it"):
            input_files(root, (".parquet",), deep=deep)


def test_a_folder_or_pipe_in_a_files_place_is_refused_by_name(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(DataError, match=r"x\.parquet is a folder: give it by its own name"):
        input_files(tmp_path, (".parquet",), deep=False)
    assert input_files(tmp_path, (".parquet",), deep=True) == []
    os.mkfifo(tmp_path / "y.txt")
    with pytest.raises(DataError, match=r"y\.txt is no regular file"):
        input_files(tmp_path, (".txt",), deep=True)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet")
    with open(path, "wb") as stream:
        stream.write(b"x")
    for look in (
        lambda: input_files(tmp_path, (".parquet",), deep=False),
        lambda: inspect_inputs([tmp_path / os.path.basename(path)]),
    ):
        with pytest.raises(DataError, match=r"udcff\.parquet': the name is not valid UTF-8.*rename the file"):
            look()


def test_one_file_under_two_names_is_refused_with_both(tmp_path):
    path = write(tmp_path / "a.parquet", rows(3))
    (tmp_path / "b.parquet").symlink_to(path)
    with pytest.raises(DataError, match=r"given twice: .*a\.parquet, as .*a\.parquet and as .*b\.parquet"):
        inspect_inputs([path, tmp_path / "b.parquet"])
    with pytest.raises(DataError, match=r"given twice: .*a\.parquet; give it once"):
        inspect_inputs([path, path])
