"""Edits made by hand to a copy of the project, and the assets whose code they change."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from vpmoe_assets.assets.step import Step
from vpmoe_assets.codebase.tree import PACKAGES, SourceTree
from vpmoe_assets.project import ROOT

RUNGS = ("vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe")
CONVERSIONS = ("qwen3_0_6b_o200k", *RUNGS)
TRAININGS = ("*_healed", "vpmoe_stage[123]", "teacher")
SCORING = ("teacher_topk",)
EVALUATIONS = ("eval_*",)
PROFILES = ("perf_profile",)

Versions = Callable[[], dict[str, str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def versions(project: Path, memory: Path, steps: dict[str, dict[str, Step]]) -> Versions:
    """Code versions of the smoke experiment by the present state of the copy."""

    def read() -> dict[str, str]:
        tree = SourceTree(project, memory=memory)
        return {
            name: replace(step, closure=tree.closure(step.closure.roots)).code_version
            for name, step in steps["smoke"].items()
        }

    return read


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def matching(names: Iterable[str], patterns: tuple[str, ...]) -> set[str]:
    """Return the assets that a pattern names; one of a checkpoint does not name its evaluation."""

    def named(name: str, pattern: str) -> bool:
        return fnmatch(name, pattern) and name.startswith("eval_") == pattern.startswith("eval_")

    return {name for name in names if any(named(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize(
    ("file", "assets"),
    [
        ("vpmoe_assets/harmony/truncate.py", ("synth_kd_v1",)),
        ("vpmoe_assets/generated/generator.py", ("synth",)),
        ("vpmoe_assets/generated/exercises/reading.py", ("synth",)),
        ("vpmoe_assets/harmony/synth_harmony.py", ("synth_harmony", "synth_kd_v1")),
        ("vpmoe_assets/evaluation/ladder.py", ("ladder_report",)),
        ("vpmoe_assets/evaluation/facts.py", ("core8_bundle",)),
        ("vpmoe_assets/synth.py", ()),
        ("vpmoe_assets/donors/download.py", ()),
        ("vpmoe_assets/harmony/audit.py", ()),
        ("vpmoe_assets/cli.py", ()),
        ("vpmoe_assets/assets/data.py", ()),
        ("vpmoe_assets/resources/trainer.py", ()),
        ("trainer/__main__.py", ()),
        ("trainer/contract/schema/training.py", ()),
        ("trainer/train/tracking.py", ()),
        ("trainer/model/gpt.py", (*RUNGS, *TRAININGS, *SCORING, *EVALUATIONS, *PROFILES)),
        ("trainer/job/startup.py", (*CONVERSIONS, *TRAININGS, *SCORING, *EVALUATIONS, *PROFILES)),
        ("trainer/optim/normuon.py", (*TRAININGS, *PROFILES)),
        ("trainer/losses/span_ce.py", ("*_healed", "vpmoe_stage1", "teacher", *PROFILES)),
        ("trainer/surgery/step.py", CONVERSIONS),
        ("trainer/surgery/convert.py", CONVERSIONS),
        ("trainer/surgery/morph.py", ("vpdense_28",)),
        ("trainer/surgery/vocabulary.py", ("qwen3_0_6b_o200k",)),
        ("trainer/evaluate/numeric.py", EVALUATIONS),
        ("trainer/evaluate/router_health.py", ("eval_vpmoe", "eval_vpmoe_stage[123]")),
    ],
)
def test_an_edit_changes_the_steps_that_run_the_file_and_no_others(
    project: Path, versions: Versions, file: str, assets: tuple[str, ...]
) -> None:
    before = versions()
    path = project / file
    text = path.read_text()
    path.write_text(f"{text}\n# Says nothing.\n")
    assert changed(before, versions()) == set()
    path.write_text(f"{text}\nCHANGED = 1\n")
    assert changed(before, versions()) == matching(before, assets)
