"""The code of a step against the code that is seen to run, and what random edits change.

A small ladder is made, each asset in a process of its own, in which every executed import is noted. That is
the oracle; the closure, which only reads the sources, is the thing under test.
"""

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.codebase import edits, small_ladder
from tests.codebase.small_ladder import ASSETS, EVERY, Seen
from tests.forks import Forks
from vpmoe_assets.assets.step import Step
from vpmoe_assets.codebase.closure import module_name
from vpmoe_assets.codebase.loaded import standing_by, unexplained
from vpmoe_assets.codebase.tree import PACKAGES, SourceTree
from vpmoe_assets.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EDITS = 100
KINDS: Mapping[str, edits.Edit] = {
    "comment, docstring, layout": edits.says_nothing,
    "constant": edits.constant,
    "new import": edits.new_import,
    "default argument": edits.default,
}


@dataclass(frozen=True)
class Ladder:
    """What was seen of a small ladder, and the steps that it was made by."""

    seen: Mapping[str, Seen]
    steps: Mapping[str, Step]
    ran: Mapping[str, set[str]]
    """Modules that took part in making each asset."""


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory, tree: SourceTree, forks: Forks) -> Ladder:
    directory = tmp_path_factory.mktemp("ladder")
    seen = small_ladder.make(directory, forks)
    beside = standing_by(tree)
    ran = {asset: what.ran(beside) for asset, what in seen.items()}
    return Ladder(seen, small_ladder.steps_of(directory), ran)


def _require_made(asset: str) -> None:
    if asset not in ASSETS:
        pytest.skip(f"{asset} was not made: VPMOE_TEST_WHOLE_LADDER=1 takes five minutes more")


@pytest.mark.parametrize("asset", EVERY)
def test_no_module_that_ran_is_missing_from_the_code_of_the_step(
    ladder: Ladder, tree: SourceTree, asset: str
) -> None:
    _require_made(asset)
    closure = ladder.steps[asset].closure
    assert unexplained(tree, closure, ladder.seen[asset].loaded) == []
    assert ladder.ran[asset] - {module_name(path) for path in closure.sources} == set()


@pytest.mark.parametrize(
    ("asset", "modules"),
    [
        ("synth", {"vpmoe_assets.generated.exercises.reading"}),
        ("synth_kd_v1", {"vpmoe_assets.harmony.truncate", "trainer.contract.indexed"}),
        ("vpdense_28", {"trainer.surgery.morph", "trainer.surgery.step", "trainer.job.startup"}),
        ("vpdense_80", {"trainer.contract.depth", "trainer.surgery.expand"}),
        ("vpmoe_stage1", {"trainer.losses.span_ce", "trainer.model.backends.reference"}),
        ("teacher_topk", {"trainer.teacher.checkpoint", "trainer.contract.topk.writer"}),
        ("vpmoe_stage2", {"trainer.losses.topk_kl", "trainer.contract.topk.store"}),
        ("vpmoe_stage3", {"trainer.losses.opd", "trainer.rollouts.source", "trainer.teacher.checkpoint"}),
        ("eval_vpmoe_stage1", {"trainer.evaluate.router_health", "trainer.evaluate.numeric"}),
        ("ladder_report", {"vpmoe_assets.evaluation.ladder", "vpmoe_assets.evaluation.comparison"}),
    ],
)
def test_the_witnesses_see_what_is_known_to_run(ladder: Ladder, asset: str, modules: set[str]) -> None:
    """An oracle that saw nothing would agree with everything."""
    _require_made(asset)
    assert modules <= ladder.ran[asset]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line of a table that is worth reading, captured or not."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(text)

    return line


def _attempts(rng: random.Random, kind: str, paths: list[str], root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield files with their text and the text after an edit of a kind, one random module after another."""
    while True:
        path = rng.choice(paths)
        text = (root / path).read_text(encoding="utf-8")
        edited = KINDS[kind](rng, text)
        if edited is not None:
            yield path, text, edited


def _versions(steps: Mapping[str, Step], tree: SourceTree) -> dict[str, str]:
    return {
        asset: replace(steps[asset], closure=tree.closure(steps[asset].closure.roots)).code_version
        for asset in ASSETS
    }


def _line(one: str, other: str) -> int:
    pairs = zip(one.splitlines(), other.splitlines(), strict=False)
    return next((number for number, (a, b) in enumerate(pairs, 1) if a != b), len(one.splitlines()))


def _named(assets: set[str]) -> str:
    return " ".join(sorted(assets)) or "-"


def test_an_edit_changes_the_assets_that_run_it_and_a_comment_none(
    ladder: Ladder, memory: Path, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """A hundred random edits of one line, in four kinds.

    An asset that was not seen to run the edited module may change where its code has the module all the same,
    for a case that this ladder does not meet; the table names it.
    """
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    tree = SourceTree(tmp_path, memory=memory)
    before = _versions(ladder.steps, tree)
    paths = [path for path in tree.content if path.endswith(".py")]
    rng = random.Random(20260131)
    wrong = []
    say(f"{'kind':28} {'line of module':60} changed | in the code, not seen to run here")
    for number in range(EDITS):
        kind = list(KINDS)[number % len(KINDS)]
        path, text, edited = next(_attempts(rng, kind, paths, tmp_path))
        (tmp_path / path).write_text(edited, encoding="utf-8")
        after = _versions(ladder.steps, SourceTree(tmp_path, memory=memory))
        (tmp_path / path).write_text(text, encoding="utf-8")
        module = module_name(path)
        changed = {asset for asset in ASSETS if after[asset] != before[asset]}
        ran = {asset for asset in ASSETS if module in ladder.ran[asset]}
        has = {asset for asset in ASSETS if path in ladder.steps[asset].closure.sources}
        say(
            f"{kind:28} {f'{_line(text, edited)} of {module}':60} {_named(changed)} | {_named(changed - ran)}"
        )
        if not (ran <= changed == has if KINDS[kind] is not edits.says_nothing else not changed):
            wrong.append((kind, module, sorted(changed), sorted(ran)))
    assert wrong == []
    assert _versions(ladder.steps, SourceTree(tmp_path, memory=memory)) == before
