"""A payload says what it is, not whose: the same recipe gives the same bytes in any experiment, anywhere."""

from pathlib import Path

import pytest

from tests.assets.graphs import DATA, NARROW_DONORS, Graph, write_experiment

pytestmark = pytest.mark.slow

NAME = "an_experiment_by_another_name"


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    directory = tmp_path_factory.mktemp(NAME)
    changes = {'name = "smoke"': f'name = "{NAME}"', **NARROW_DONORS}
    file = write_experiment(directory / "renamed.toml", changes)
    graph = Graph(file, directory / "artifacts")
    graph.make(*DATA, "core8_bundle", "qwen3_0_6b", "gpt_oss_20b")
    return graph


def test_data_have_the_same_digests_under_another_name(renamed: Graph, tiny_made) -> None:
    tiny, _ = tiny_made
    for asset in DATA:
        ours, theirs = renamed.store.find(NAME, asset), tiny.store.find("tiny", asset)
        assert ours is not None
        assert theirs is not None
        assert (ours.digest, ours.fingerprint) == (theirs.digest, theirs.fingerprint), asset


def test_no_file_of_a_payload_holds_the_name_or_a_path(renamed: Graph) -> None:
    words = [word.encode() for word in (NAME, str(renamed.root), str(Path.cwd()))]
    seen = 0
    for record in renamed.store.records(NAME):
        for entry in record.files:
            content = (renamed.store.payload(record) / entry.path).read_bytes()
            assert [word for word in words if word in content] == [], f"{record.asset}/{entry.path}"
            seen += 1
    assert seen > 20
