import hashlib
import json

import pytest

from trainer.contract.canonical import UnstableValueError
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.lineage.fingerprint import code_version, recipe_fingerprint, recorded_code_version

CODE = Closure(("pkg.a",), {"pkg/a.py": "a" * 64}, {"pyarrow": "26.0.0"})
RECIPE, INPUTS = {"lr": 2e-3, "steps": 10}, {"synth": "d" * 64}


def test_fingerprint_is_the_sha256_of_its_payload():
    fingerprint, payload = recipe_fingerprint(RECIPE, CODE, INPUTS)
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    assert fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert payload == {
        "schema": "vpmoe.fingerprint/2",
        "recipe": RECIPE,
        "sources": {"pkg/a.py": "a" * 64},
        "packages": {"pyarrow": "26.0.0"},
        "inputs": INPUTS,
    }


@pytest.mark.parametrize(
    ("recipe", "code", "inputs"),
    [
        (RECIPE | {"steps": 11}, CODE, INPUTS),
        (RECIPE, Closure(("pkg.a",), {"pkg/a.py": "b" * 64}, CODE.packages), INPUTS),
        (RECIPE, Closure(("pkg.a",), {**CODE.sources, "pkg/b.py": "b" * 64}, CODE.packages), INPUTS),
        (RECIPE, Closure(("pkg.a",), CODE.sources, {"pyarrow": "27.0.0"}), INPUTS),
        (RECIPE, Closure(("pkg.a",), CODE.sources, {}), INPUTS),
        (RECIPE, CODE, {"synth": "e" * 64}),
        (RECIPE, CODE, {}),
    ],
)
def test_fingerprint_changes_with_recipe_code_packages_and_inputs_and_code_version_without_the_last(
    recipe, code, inputs
):
    assert recipe_fingerprint(recipe, code, inputs)[0] != recipe_fingerprint(RECIPE, CODE, INPUTS)[0]
    assert (code_version(recipe, code) == code_version(RECIPE, CODE)) == (inputs != INPUTS)


def test_fingerprint_does_not_depend_on_the_order_of_keys_or_on_how_the_code_was_found():
    other = Closure(("pkg.a", "pkg"), dict(reversed(CODE.sources.items())), CODE.packages)
    again = recipe_fingerprint(dict(reversed(RECIPE.items())), other, INPUTS)[0]
    assert again == recipe_fingerprint(RECIPE, CODE, INPUTS)[0]


def test_a_record_says_which_code_version_it_was_made_under():
    _, payload = recipe_fingerprint(RECIPE, CODE, INPUTS)
    assert recorded_code_version(payload) == code_version(RECIPE, CODE)
    older = {"schema": "vpmoe.fingerprint/1", "recipe": RECIPE, "sources": {}}
    text = json.dumps(older, sort_keys=True, separators=(",", ":"))
    assert recorded_code_version(older | {"inputs": INPUTS}) == hashlib.sha256(text.encode()).hexdigest()


def test_an_unstable_recipe_is_refused_with_its_key_path():
    with pytest.raises(UnstableValueError, match=r"\$\.recipe\.training\.lr"):
        recipe_fingerprint({"training": {"lr": float("nan")}}, CODE, {})
