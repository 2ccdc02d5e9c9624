"""What `vpmoe diff` prints: one line a part, lists under it on demand, as text or as Markdown."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vpmoe_assets.units import human_bytes

if TYPE_CHECKING:
    from vpmoe_assets.lineage.comparison import Comparison, FileChange, NumberChange, Side
    from vpmoe_assets.lineage.difference import Change
    from vpmoe_assets.lineage.group_comparison import GroupComparison, Pair
    from vpmoe_assets.lineage.record import Scalar
    from vpmoe_assets.lineage.row_changes import RowChanges
    from vpmoe_assets.lineage.tensors import TensorChanges

SCREEN = 24
"""Lines of the first answer, at most, of a terminal that wraps none."""
COLUMNS = 110
_LISTED = 5
_TITLE = 12


@dataclass
class Section:
    """One part of a comparison.

    Attributes:
        title: What is compared.
        said: In a line.
        lines: Everything, one thing a line.
        shown: Print the lines.
        language: Of the lines, in Markdown; none for a list.
    """

    title: str
    said: str
    lines: Sequence[str] = field(default=())
    shown: bool = False
    language: str = ""


def head(comparison: "Comparison") -> list[str]:
    """Say what the two are, and the answer."""
    return [f"a  {_side(comparison.a)}", f"b  {_side(comparison.b)}", comparison.answer]


def sections(comparison: "Comparison", shown: Iterable[str] = ()) -> list[Section]:
    """Return the parts of a comparison that says anything, identity first.

    Args:
        comparison: Of two artifacts.
        shown: Titles whose lines are wanted.
    """
    wanted = set(shown)
    counts = comparison.counts
    recipe = [str(change) for change in comparison.identity.recipe]
    found = [
        Section("recipe", _first(recipe, "the same"), recipe, shown=1 < len(recipe) <= _LISTED),
        Section("code", _code(comparison), _edits(comparison)),
        Section("inputs", _inputs(comparison), _input_lines(comparison)),
        Section(
            "packages",
            _packages(comparison),
            [str(each) for each in (*comparison.identity.packages, *comparison.installed)],
        ),
        Section(
            "environment",
            _first([*map(str, comparison.environment)], "the same"),
            _lines(comparison.environment),
        ),
        Section(
            "execution", _first([*map(str, comparison.execution)], "the same"), _lines(comparison.execution)
        ),
    ]
    if any(counts["metrics"]):
        numbers = [_number(each) for each in comparison.metrics]
        real = [_number(each) for each in comparison.metrics if not each.timing]
        found.append(Section("metrics", _first(real, "the same, clocks apart"), numbers))
    if parting := comparison.parting:
        apart = [_number(each) for each in parting.numbers]
        only = f"only one side logged it ({parting.steps[0]} and {parting.steps[1]} steps)"
        found.append(Section("curve", f"apart from step {parting.step}: {_first(apart, only)}", apart))
    if any(counts["checks"]):
        same = f"the same ({counts['checks'][1]})"
        found.append(Section("checks", _first(_lines(comparison.checks), same), _lines(comparison.checks)))
    files = [_file(each) for each in comparison.files]
    total = max(counts["files"])
    said = f"{len(files)} of {total} differ: {_first(files, '')}" if files else f"the same ({total})"
    run = [f"run/{_file(each)}" for each in comparison.run_files]
    found.append(Section("files", said, files + run))
    for section in found:
        section.shown = section.shown or section.title in wanted
    return found


def group_head(comparison: "GroupComparison") -> list[str]:
    """Say what the two groups are, and the answer."""
    states: dict[str, int] = {}
    for pair in comparison.pairs:
        states[pair.state] = states.get(pair.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    return [
        f"a  {comparison.what} {comparison.a}",
        f"b  {comparison.what} {comparison.b}",
        f"{len(comparison.pairs)} assets: {told}" if comparison.pairs else "no assets on either side",
    ]


def group_sections(comparison: "GroupComparison", shown: Iterable[str] = ()) -> list[Section]:
    """Return the parts of a comparison of two runs or experiments."""
    causes = [pair for pair in comparison.pairs if pair.own]
    led = [pair for pair in comparison.pairs if not pair.own and pair.state not in ("same",)]
    settings = [str(change) for change in comparison.settings]
    found = [
        Section("settings", _first(settings, "the same"), settings, shown=1 < len(settings) <= _LISTED),
        Section(
            "by itself", _first([pair.asset for pair in causes], "none"), [*map(_pair, causes)], shown=True
        ),
        Section("by inputs", _first([pair.asset for pair in led], "none"), [*map(_pair, led)], shown=True),
    ]
    room = SCREEN - 6 - (len(settings) if found[0].shown else 0)
    for section in found[1:]:
        # A screen answers first; `--assets` lists them all.
        section.shown = len(section.lines) <= room or "assets" in set(shown)
        room -= len(section.lines) if section.shown else 0
    return found


def tensor_section(changes: "TensorChanges") -> Section:
    """Return the tensors that differ, the largest relative change first."""
    lines = []
    for each in changes.changed:
        if each.norm is None:
            lines.append(f"{each.name}  {each.old or '(absent)'} → {each.new or '(absent)'}")
            continue
        relative = "" if each.relative is None else f"  relative {each.relative:.3g}"
        types = "" if each.old == each.new else f"  {each.old} → {each.new}"
        bad = f"  {each.not_finite} not finite" if each.not_finite else ""
        lines.append(
            f"{each.name}  ‖b−a‖ {each.norm:.4g}{relative}  largest {each.largest:.3g}  "
            f"{each.moved:.1%} of elements{types}{bad}"
        )
    relative = "" if changes.relative is None else f", {changes.relative:.3g} of ‖a‖"
    said = f"{len(changes.changed)} differ, {changes.same} are the same; ‖b−a‖ {changes.norm:.4g}{relative}"
    return Section("tensors", said, lines, shown=True)


def row_section(changes: "RowChanges") -> Section:
    """Return how many rows were added, removed and changed, and the first of each."""
    said = f"{changes.added} added, {changes.removed} removed, {changes.changed} changed"
    if changes.reordered:
        said += "; the same in another order"
    said += f" ({changes.old_rows} → {changes.new_rows})"
    lines = [f"+ {name}" for name in changes.added_examples]
    lines += [f"- {name}" for name in changes.removed_examples]
    lines += [f"~ {each.row}: {', '.join(each.columns)}" for each in changes.examples]
    return Section("rows", said, lines, shown=True)


def as_text(top: Sequence[str], parts: Sequence[Section], notes: Sequence[str]) -> list[str]:
    """Return the lines for a terminal; code keeps its own."""
    lines = list(top)
    for part in parts:
        listed = part.shown and part.lines
        said = part.said if not listed or part.language or part.title in _COUNTED else f"{len(part.lines)}"
        lines += _wrapped(f"{part.title:<{_TITLE}} {said}")
        if listed:
            lines += part.lines if part.language else [f"  {line}" for line in part.lines]
    return lines + [f"note: {note}" for note in notes]


def _wrapped(line: str) -> list[str]:
    """Return a section's line in as many as a screen needs; the title stands alone on the left."""
    return textwrap.wrap(
        line,
        COLUMNS,
        subsequent_indent=" " * (_TITLE + 1),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


_COUNTED = frozenset({"code", "packages", "files", "tensors", "rows", "curve"})
"""Sections whose line says more than the first of its list."""


def as_markdown(top: Sequence[str], parts: Sequence[Section], notes: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown document: a table of the parts, and every list."""
    lines = [f"- {_escaped(line)}" for line in top] + ["", "| | |", "| --- | --- |"]
    lines += [f"| {part.title} | {_escaped(part.said)} |" for part in parts]
    for part in parts:
        if part.language:
            fence = "`" * max([3, *(len(run) + 1 for line in part.lines for run in re.findall("`+", line))])
            lines += ["", f"### {part.title}", "", f"{fence}{part.language}", *part.lines, fence]
        elif part.lines:
            lines += ["", f"### {part.title}", "", *(f"- {_escaped(line)}" for line in part.lines)]
    return lines + (["", *(f"> {_escaped(note)}" for note in notes)] if notes else [])


def _escaped(text: str) -> str:
    return "".join(f"\\{each}" if each in "\\|*_<>`[]#" else each for each in text)


def _side(side: "Side") -> str:
    code = side.git_sha[:10] + (" with changes" if side.git_dirty else "")
    return f"{side.name}  {side.published_utc[:16].replace('T', ' ')}  {side.seconds:.0f} s  code {code}"


def _first(lines: Sequence[str], nothing: str) -> str:
    if not lines:
        return nothing
    shown = list(lines[: 3 if len(lines) > 3 else len(lines)])
    more = f"; and {len(lines) - len(shown)} more" if len(lines) > len(shown) else ""
    return "; ".join(shown) + more


def _lines(found: "Iterable[Change]") -> list[str]:
    return [str(change) for change in found]


def _code(comparison: "Comparison") -> str:
    total = max(comparison.counts["sources"])
    decide = [each for each in comparison.code if each.decides]
    if not comparison.identity.sources:
        beside = f"; {len(comparison.code)} files beside them differ" if comparison.code else ""
        return f"the same: {total} files decide its bytes{beside}"
    if not decide:
        return _first([change.name for change in comparison.identity.sources], "")
    others = len(comparison.code) - len(decide)
    said = _first([f"{each.path} (+{each.added} −{each.removed})" for each in decide], "")
    return said + (f"; and {others} that do not decide its bytes" if others else "")


def _edits(comparison: "Comparison") -> list[str]:
    return [
        f"{each.path} +{each.added} −{each.removed}"
        + ("" if each.decides else " (does not decide its bytes)")
        for each in comparison.code
    ]


def _inputs(comparison: "Comparison") -> str:
    if not comparison.inputs:
        return "the same" if any(comparison.counts["inputs"]) else "none"
    return _first(_input_lines(comparison), "")


def _input_lines(comparison: "Comparison") -> list[str]:
    return [
        f"{each.role} {each.old or '(absent)'} → {each.new or '(absent)'}"
        + (" (the same bytes)" if each.same_content else "")
        for each in comparison.inputs
    ]


def _packages(comparison: "Comparison") -> str:
    decide = _first(_lines(comparison.identity.packages), "those that decide its bytes are the same")
    count = len(comparison.installed)
    return decide + (f"; {count} installed differ" if count else "")


def _number(change: "NumberChange") -> str:
    said = f"{change.name} {_value(change.old)} → {_value(change.new)}"
    relative = change.relative
    return said if relative is None else f"{said} ({relative:+.2%})"


def _value(value: "Scalar") -> str:
    if value is None:
        return "(absent)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _file(change: "FileChange") -> str:
    if change.old_size is None or change.new_size is None:
        size = change.new_size if change.old_size is None else change.old_size
        return (
            f"{change.path} ({'added' if change.old_size is None else 'removed'}, {human_bytes(size or 0)})"
        )
    if change.old_size == change.new_size:
        return f"{change.path} ({human_bytes(change.new_size)})"
    return f"{change.path} ({human_bytes(change.old_size)} → {human_bytes(change.new_size)})"


def _pair(pair: "Pair") -> str:
    if pair.old is None or pair.new is None:
        return f"{pair.asset}  {pair.state} ({pair.old or pair.new})"
    said = f"{pair.asset}  {pair.state}"
    why = [*pair.own.lines(), *([f"inputs: {', '.join(pair.inputs)}"] if pair.inputs else [])]
    if why:
        said += f"  {_first(why, '')}"
    if pair.metrics and pair.metrics[1] != pair.metrics[2]:
        name, one, other = pair.metrics
        said += f"  [{name} {_value(one)} → {_value(other)}]"
    return said
