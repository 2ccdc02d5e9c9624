import hashlib
import json

import pytest

from trainer.contract.canonical import UnstableValueError
from vpmoe_assets.lineage.fingerprint import code_version, recipe_fingerprint, source_digests


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pkg" / "deep").mkdir(parents=True)
    (tmp_path / "pkg" / "a.py").write_text("A = 1\n")
    (tmp_path / "pkg" / "deep" / "b.py").write_text("B = 1\n")
    (tmp_path / "pkg" / "notes.txt").write_text("not code\n")
    return tmp_path


def test_sources_are_named_relative_to_the_project_whether_given_as_files_or_directories(project):
    digests = source_digests([project / "pkg"], root=project)
    assert digests == {
        "pkg/a.py": hashlib.sha256(b"A = 1\n").hexdigest(),
        "pkg/deep/b.py": hashlib.sha256(b"B = 1\n").hexdigest(),
    }
    from pathlib import Path

    assert source_digests([Path("pkg/deep/b.py"), Path("pkg/a.py")], root=project) == digests


def test_sources_that_do_not_exist_are_an_error(project):
    with pytest.raises(FileNotFoundError):
        source_digests([project / "pkg" / "gone.py"], root=project)
    (project / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no Python file"):
        source_digests([project / "empty"], root=project)


def test_fingerprint_is_the_sha256_of_its_payload(project):
    sources = source_digests([project / "pkg"], root=project)
    fingerprint, payload = recipe_fingerprint({"lr": 2e-3}, sources, {"synth": "d" * 64})
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    assert fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert payload["recipe"] == {"lr": 2e-3}


def test_fingerprint_changes_with_recipe_code_and_inputs_and_code_version_with_the_first_two_only(project):
    sources = source_digests([project / "pkg"], root=project)
    recipe, inputs = {"lr": 2e-3, "steps": 10}, {"synth": "d" * 64}
    base, version = recipe_fingerprint(recipe, sources, inputs)[0], code_version(recipe, sources)

    assert recipe_fingerprint(dict(reversed(recipe.items())), sources, inputs)[0] == base
    assert recipe_fingerprint(recipe, sources, {"synth": "e" * 64})[0] != base
    assert recipe_fingerprint(recipe, sources, {})[0] != base
    assert recipe_fingerprint(recipe | {"steps": 11}, sources, inputs)[0] != base
    assert code_version(recipe | {"steps": 11}, sources) != version

    (project / "pkg" / "a.py").write_text("A = 2\n")
    changed = source_digests([project / "pkg"], root=project)
    assert recipe_fingerprint(recipe, changed, inputs)[0] != base
    assert code_version(recipe, changed) != version


def test_an_unstable_recipe_is_refused_with_its_key_path():
    with pytest.raises(UnstableValueError, match=r"\$\.recipe\.training\.lr"):
        recipe_fingerprint({"training": {"lr": float("nan")}}, {}, {})
