"""Which packages of others decide the bytes of a step."""

import sys

import pytest

from vpmoe_assets.codebase import toolchain
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.facts import facts_of
from vpmoe_assets.codebase.toolchain import (
    DECIDERS,
    NEUTRAL,
    STRICT,
    deciding_packages,
    installed,
    toolchain_difference,
)
from vpmoe_assets.codebase.tree import PACKAGES, SourceTree


def test_every_package_that_a_step_imports_is_known_to_decide_bytes_or_not_to(
    tree: SourceTree, closures: dict[str, Closure]
) -> None:
    """A new one gets its line in `DECIDERS` or `NEUTRAL`, with a reason."""
    paths = {path for closure in closures.values() for path in closure.sources}
    imported = {name.partition(".")[0] for path in paths for name in tree.facts(path).imports}
    others = imported - set(PACKAGES) - set(sys.stdlib_module_names)
    deciding = {name.partition(".")[0] for decider in DECIDERS.values() for name in decider.uses}
    assert others - deciding == set(NEUTRAL)
    assert deciding - others == {"mergekit"}, "run as a program, never imported"


def test_every_decider_decides_something_and_is_installed(closures: dict[str, Closure]) -> None:
    used = {name for closure in closures.values() for name in closure.packages}
    assert used == set(DECIDERS)
    assert all(installed(name) != "absent" for name in DECIDERS)


@pytest.mark.parametrize(
    ("asset", "packages"),
    [
        ("o200k_tokenizer", {"tiktoken", "openai-harmony"}),
        ("synth", {"pyarrow"}),
        ("synth_harmony", {"pyarrow"}),
        ("synth_kd_v1", {"pyarrow", "tiktoken", "openai-harmony", "orjson"}),
        ("qwen3_0_6b", {"safetensors", "orjson", "tiktoken"}),
        ("qwen3_0_6b_o200k", {"mergekit", "tokenizers"}),
        ("vpmoe_stage1", {"safetensors"}),
        ("eval_vpmoe", {"numpy", "safetensors", "tiktoken", "transformers"}),
        ("ladder_report", {"matplotlib"}),
    ],
)
def test_the_packages_of_a_step_are_those_that_write_tokenize_or_draw_for_it(
    closures: dict[str, Closure], asset: str, packages: set[str]
) -> None:
    assert set(closures[f"smoke/{asset}"].packages) == packages


@pytest.mark.parametrize(
    ("text", "packages"),
    [
        ("import numpy as np\nnp.random.default_rng(1).normal()", {"numpy"}),
        ("from numpy.random import Generator\nGenerator(bits)", {"numpy"}),
        ("import numpy as np\nnp.random.Philox(key=1).random_raw(3)", set()),
        ("import numpy as np\nnp.zeros(3)", set()),
        ("import torch\ntorch.random.manual_seed(1)", set()),
        ("import pyarrow.parquet as pq\npq.ParquetWriter(path, schema)", {"pyarrow"}),
        ("import pyarrow.parquet as pq\npq.read_table(path)", set()),
        ("from safetensors.torch import save_file\nsave_file(x, path)", {"safetensors"}),
        ("from safetensors import safe_open\nsafe_open(path)", set()),
        ("def f():\n    import orjson\n    return orjson.dumps(x)", {"orjson"}),
        ("import orjson\norjson.loads(x)", set()),
        ("run('mergekit.scripts.tokensurgeon')", {"mergekit"}),
    ],
)
def test_it_is_the_use_that_decides(text: str, packages: set[str]) -> None:
    facts = facts_of(text.encode(), "trainer/x.py")
    assert set(deciding_packages([*facts.uses, *facts.imports])) == packages


def test_another_release_of_a_deciding_package_is_another_code(
    tree: SourceTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree.closure(["vpmoe_assets.generated.generator"])
    monkeypatch.setattr(toolchain, "installed", lambda name: "99.0" if name == "pyarrow" else installed(name))
    after = SourceTree().closure(["vpmoe_assets.generated.generator"])
    assert after.packages == {"pyarrow": "99.0"}
    assert after.sources == before.sources
    assert after.digest != before.digest


def test_a_record_made_with_another_torch_is_told_apart() -> None:
    now = {name: installed(name) for name in STRICT}
    assert toolchain_difference({"packages": {**now, "wandb": "0.1"}}) == {}
    assert toolchain_difference({"packages": now | {"torch": "1.0"}}) == {"torch": ("1.0", now["torch"])}
    assert toolchain_difference({}) == {name: ("absent", release) for name, release in now.items()}
