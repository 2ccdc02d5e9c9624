"""`vpmoe show --sources`: the code that decides the bytes of an artifact, as recorded and as it is now."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.lineage.fabricate import draft, publish
from vpmoe_assets.cli import main
from vpmoe_assets.codebase.bystanders import BYSTANDERS
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.fingerprint import recipe_fingerprint
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

ROOTS = ["vpmoe_assets.generated.generator"]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    return Store(tmp_path / "artifacts")


@pytest.fixture(scope="module")
def code() -> Closure:
    return SourceTree().closure(ROOTS)


def recorded(store: Store, code: Closure) -> Record:
    """Publish a `synth` that says that it was made with some code."""
    fingerprint, payload = recipe_fingerprint({"rows": 12}, code, {})
    with store.work_area("smoke", "synth", fingerprint) as work:
        (work.payload / "data.bin").write_bytes(b"rows")
        return store.publish(work, draft(payload))


def shown(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["show", *arguments, "--sources"])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_the_sources_of_an_artifact_are_those_of_its_record(store: Store, code: Closure) -> None:
    record = recorded(store, code)
    text = shown("synth")
    assert f"smoke/synth: {len(code.sources)} files decide its bytes, as recorded in {record.version}" in text
    for path, digest in code.sources.items():
        assert f"  {digest[:12]}  {path}\n" in text
    assert f"pyarrow {code.packages['pyarrow']}" in text
    for name, reason in BYSTANDERS.items():
        assert f"  {name}: {reason}" in text


def test_files_that_say_another_thing_now_are_marked(store: Store, code: Closure) -> None:
    edited, gone = "vpmoe_assets/generated/generator.py", "vpmoe_assets/generated/gone.py"
    recorded(store, Closure((), {**code.sources, edited: "0" * 64, gone: "0" * 64}, code.packages))
    text = shown("synth")
    assert f"{edited}  (says another thing now)" in text
    assert f"{gone}  (is no longer there)" in text
    answer = json.loads(shown("synth", "--json"))
    assert {path for path, state in answer["now"].items() if state != "same"} == {edited, gone}
    assert answer["packages"] == dict(code.packages)


def test_what_was_never_published_is_shown_as_the_code_is_now(code: Closure) -> None:
    answer = json.loads(shown("synth", "--json"))
    assert answer["of"] == "now"
    assert answer["roots"] == ROOTS
    assert answer["sources"] == dict(code.sources)
    assert "smoke/synth: " in shown("synth")


def test_the_code_as_it_is_now_can_be_asked_for(store: Store, code: Closure) -> None:
    recorded(store, Closure((), {}, {}))
    assert json.loads(shown("synth", "--json"))["sources"] == {}
    assert json.loads(shown("synth@now", "--json"))["sources"] == dict(code.sources)
    assert "as the code is now" in shown("synth@now")


def test_a_record_of_the_earlier_schema_is_listed_and_not_compared(store: Store) -> None:
    payload = {"schema": "vpmoe.fingerprint/1", "recipe": {}, "sources": {"a.py": "1" * 64}, "inputs": {}}
    from trainer.contract.canonical import sha256_json

    with store.work_area("smoke", "synth", sha256_json(payload)) as work:
        (work.payload / "data.bin").write_bytes(b"rows")
        store.publish(work, draft(payload))
    assert "  111111111111  a.py\n" in shown("synth")
    assert json.loads(shown("synth", "--json"))["now"] == {}


def test_a_version_or_asset_that_is_not_there_is_refused(store: Store) -> None:
    publish(store, "synth")
    assert "smoke/synth@20000101.1-00000000 is not in the store" in shown("synth@20000101.1-00000000", code=1)
    assert "did you mean synth" in shown("synht", code=1)
