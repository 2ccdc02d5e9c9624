"""Two artifacts side by side: recipe, code, inputs, environment, numbers, checks and files, by name.

`compare` returns one value that holds all of it without opening a payload; `to_dict` is its JSON form. What
payloads hold is compared on demand: `vpmoe_assets.lineage.tensors`, `vpmoe_assets.lineage.row_changes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.code_changes import FileEdit, edits
from vpmoe_assets.lineage.difference import Change, Difference, changes, recipe_changes
from vpmoe_assets.lineage.digest import FileEntry
from vpmoe_assets.lineage.errors import ComparisonError, LineageError
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import InputRef, Record, Scalar
from vpmoe_assets.lineage.store import Store

SCHEMA = "vpmoe.diff/1"

Kind = Literal["checkpoint", "data set", "evaluation", "files"]

_TIMING = ("step_ms", "tokens_per_second", "seconds", "rss", "time", "memory")
"""Parts of names of numbers that no two runs agree on; they set no two runs apart."""
_ROWS = (".parquet", ".jsonl", ".idx")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two.

    Attributes:
        directory: Of the version.
        seconds: From its start to its end.
    """

    experiment: str
    asset: str
    version: str
    digest: str
    record_digest: str
    fingerprint: str
    published_utc: str
    directory: str
    size: int
    seconds: float
    git_sha: str
    git_dirty: bool
    run: str | None

    @property
    def name(self) -> str:
        """`experiment/asset@version`."""
        return f"{self.experiment}/{self.asset}@{self.version}"


@dataclass(frozen=True, slots=True)
class InputChange:
    """An input that is not the same version on both sides.

    Attributes:
        role: Under which it is used.
        old: `asset@version`, or None.
        new: The same of the other side.
        same_content: Other versions with equal bytes: nothing that was made of it differs for that.
    """

    role: str
    old: str | None
    new: str | None
    same_content: bool


@dataclass(frozen=True, slots=True)
class NumberChange:
    """A number, or word, that differs.

    Attributes:
        name: Of the metric; of a score `eval.<object>.<suite>.<task>`; of a detail its dotted key.
        old: Value, or None where it was not measured.
        new: The same of the other side.
        timing: It measures the machine or the clock, and differs between any two runs.
    """

    name: str
    old: Scalar
    new: Scalar
    timing: bool

    @property
    def relative(self) -> float | None:
        """Change as a fraction of the old value; None where that says nothing."""
        if isinstance(self.old, bool) or isinstance(self.new, bool):
            return None
        if not isinstance(self.old, int | float) or not isinstance(self.new, int | float) or not self.old:
            return None
        return (self.new - self.old) / abs(self.old)


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that is not the same; the size and sha256 of a side that lacks it are None."""

    path: str
    old_size: int | None
    new_size: int | None
    old_sha256: str | None
    new_sha256: str | None


@dataclass(frozen=True, slots=True)
class Parting:
    """Where the curves of two trainings part.

    Attributes:
        step: The first logged step at which a number differs, clocks apart.
        numbers: What differs there; empty where only one side has the step.
        steps: Logged by each side.
    """

    step: int
    numbers: tuple[NumberChange, ...]
    steps: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that differs between two artifacts, payloads unopened.

    Attributes:
        a: The first.
        b: The second; a change goes from the first to it.
        kind: What both are.
        identity: Recipe, code that decides bytes, packages that decide bytes.
        inputs: By role.
        code: Every source file whose bytes differ between the two snapshots, with counts of lines; those that
            decide bytes first.
        environment: Machine, interpreter, releases, variables; by dotted key.
        execution: How it ran: device, processes, launcher, seed, command.
        installed: Every installed package, by version.
        metrics: Numbers of the records.
        parting: Where curves part; None where they do not, or there are none.
        checks: Last words, by check.
        files: Of the payload.
        run_files: Of `run/`.
        counts: How many there are of each on the first and the second side.
        notes: What could not be compared, and why.
    """

    a: Side
    b: Side
    kind: Kind
    identity: Difference
    inputs: tuple[InputChange, ...]
    code: tuple[FileEdit, ...]
    environment: tuple[Change, ...]
    execution: tuple[Change, ...]
    installed: tuple[Change, ...]
    metrics: tuple[NumberChange, ...]
    parting: Parting | None
    checks: tuple[Change, ...]
    files: tuple[FileChange, ...]
    run_files: tuple[FileChange, ...]
    counts: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]

    @property
    def same_content(self) -> bool:
        """Whether the payloads are equal, byte for byte."""
        return self.a.digest == self.b.digest

    @property
    def same_recipe(self) -> bool:
        """Whether recipe, code, packages and the contents of inputs are equal."""
        return self.a.fingerprint == self.b.fingerprint

    @property
    def same(self) -> bool:
        """Whether it is the same thing made in the same way, wherever and whenever."""
        return self.same_content and self.same_recipe

    @property
    def answer(self) -> str:
        """What came of the comparison, in a line: of the contents, and of how they were made."""
        if self.same:
            return "the same: equal content, recipe, code, packages and inputs"
        if self.same_content:
            said = "equal content, made otherwise"
        elif self.same_recipe:
            said = "made in the same way from the same inputs, with other content"
        else:
            said = "other content"
        causes = {
            "recipe": self.identity.recipe,
            "code": self.identity.sources,
            "packages": self.identity.packages,
            "inputs": [each for each in self.inputs if not each.same_content],
        }
        words = [word for word, found in causes.items() if found]
        return f"{said}; what differs in how they were made: {', '.join(words)}" if words else said

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        fields = asdict(self)
        del fields["identity"]
        return {
            "schema": SCHEMA,
            "same": self.same,
            "same_content": self.same_content,
            "same_recipe": self.same_recipe,
            **fields,
            **self.identity.to_json(),
        }


def kind_of(record: Record) -> Kind:
    """Say what an artifact is, by its files."""
    if record.evals:
        return "evaluation"
    names = [entry.path for entry in record.files]
    if any(name.endswith(".safetensors") for name in names):
        return "checkpoint"
    return "data set" if any(name.endswith(_ROWS) for name in names) else "files"


def compare(store: Store, old: Record, new: Record) -> Comparison:
    """Compare two artifacts of one kind.

    Args:
        store: Where both are.
        old: The first.
        new: The second.

    Raises:
        ComparisonError: They are of different kinds.
        StatementError: What was said of one was altered.
    """
    if old.asset != new.asset and kind_of(old) != kind_of(new):
        raise ComparisonError(
            f"{version_name(old)} is of kind {kind_of(old)} and {version_name(new)} of kind {kind_of(new)}: "
            "name two of one kind, such as two versions of one asset"
        )
    notes: list[str] = []
    objects = ObjectStore(store.root)
    identity = Difference.between(old.fingerprint_payload, new.fingerprint_payload)
    return Comparison(
        a=_side(store, old),
        b=_side(store, new),
        kind=kind_of(new),
        identity=identity,
        inputs=_inputs(old.inputs, new.inputs),
        code=_code(objects, old, new, {change.name for change in identity.sources}, notes),
        environment=recipe_changes(_environment(old), _environment(new)),
        execution=recipe_changes(_execution(old), _execution(new)),
        installed=_installed(objects, old, new, notes),
        metrics=_numbers(_measured(old), _measured(new)),
        parting=parting(_curve(store, old, notes), _curve(store, new, notes)),
        checks=changes(_checks(store, old), _checks(store, new)),
        files=file_changes(old.files, new.files),
        run_files=file_changes(old.run_files, new.run_files),
        counts={
            "sources": (_count(old, "sources"), _count(new, "sources")),
            "recipe": (_values(old.recipe), _values(new.recipe)),
            "inputs": (len(old.inputs), len(new.inputs)),
            "metrics": (len(_measured(old)), len(_measured(new))),
            "checks": (len(_checks(store, old)), len(_checks(store, new))),
            "files": (len(old.files), len(new.files)),
            "run_files": (len(old.run_files), len(new.run_files)),
        },
        notes=tuple(notes),
    )


def file_changes(old: Iterable[FileEntry], new: Iterable[FileEntry]) -> tuple[FileChange, ...]:
    """Return the files that are not the same on both sides, by path."""
    before, after = ({entry.path: entry for entry in side} for side in (old, new))
    found = []
    for path in sorted(before.keys() | after.keys()):
        one, other = before.get(path), after.get(path)
        if one != other:
            sizes = [None if each is None else each.size for each in (one, other)]
            digests = [None if each is None else each.sha256 for each in (one, other)]
            found.append(FileChange(path, sizes[0], sizes[1], digests[0], digests[1]))
    return tuple(found)


def parting(
    old: Mapping[int, Mapping[str, Scalar]], new: Mapping[int, Mapping[str, Scalar]]
) -> Parting | None:
    """Return where two curves part, clocks apart; None where they do not, or one side has none.

    Args:
        old: Numbers by step.
        new: Numbers by step.
    """
    if not old or not new:
        return None
    for step in sorted(old.keys() | new.keys()):
        if step not in old or step not in new:
            return Parting(step, (), (len(old), len(new)))
        if found := tuple(each for each in _numbers(old[step], new[step]) if not each.timing):
            return Parting(step, found, (len(old), len(new)))
    return None


def _side(store: Store, record: Record) -> Side:
    from datetime import datetime

    took = datetime.fromisoformat(record.finished_utc) - datetime.fromisoformat(record.started_utc)
    return Side(
        record.experiment,
        record.asset,
        record.version,
        record.digest,
        record.record_digest,
        record.fingerprint,
        record.published_utc,
        str(store.directory(record)),
        record.size,
        took.total_seconds(),
        record.code.git_sha,
        record.code.git_dirty,
        record.dagster_run_id,
    )


def _inputs(old: Sequence[InputRef], new: Sequence[InputRef]) -> tuple[InputChange, ...]:
    before, after = ({reference.role: reference for reference in side} for side in (old, new))
    found = []
    for role in sorted(before.keys() | after.keys()):
        one, other = before.get(role), after.get(role)
        if one is None or other is None or one.record_digest != other.record_digest:
            names = [None if each is None else f"{each.asset}@{each.version}" for each in (one, other)]
            same = one is not None and other is not None and one.digest == other.digest
            found.append(InputChange(role, names[0], names[1], same))
    return tuple(found)


def _code(
    objects: ObjectStore, old: Record, new: Record, decide: set[str], notes: list[str]
) -> tuple[FileEdit, ...]:
    one, other = old.objects.sources, new.objects.sources
    if one == other and one is not None:
        return ()
    if one is None or other is None:
        if decide:
            notes.append("code: a record without a snapshot of its sources; only names of files are known")
        return ()
    try:
        return edits(objects, one, other, decide)
    except (LineageError, OSError, ValueError) as error:
        notes.append(f"code: {error}")
        return ()


def _environment(record: Record) -> dict[str, Any]:
    found = {key: value for key, value in record.environment.items() if value is not None}
    found.pop("executable", None)  # a path: says where, never what
    return found


def _execution(record: Record) -> dict[str, Any]:
    return {**record.execution, "seed": record.seed, "command": " ".join(record.command)}


def _installed(objects: ObjectStore, old: Record, new: Record, notes: list[str]) -> tuple[Change, ...]:
    one, other = old.objects.packages, new.objects.packages
    if one == other or one is None or other is None:
        return ()
    try:
        before, after = (
            {entry["name"]: str(entry["version"]) for entry in objects.get_json(each)}
            for each in (one, other)
        )
    except (LineageError, OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"installed packages: {error}")
        return ()
    return changes(before, after)


def _measured(record: Record) -> dict[str, Scalar]:
    found: dict[str, Scalar] = dict(record.metrics)
    for score in record.evals:
        found[f"eval.{score.object_asset}.{score.suite}.{score.task}"] = score.score
    for figure in record.perf:
        found[f"perf.{figure.name} ({figure.unit})"] = figure.value
    found.update(_scalars(record.details, "details."))
    return found


def _scalars(tree: Mapping[str, Any], prefix: str) -> dict[str, Scalar]:
    """Return the numbers of nested tables, by dotted key; identities in words stand elsewhere."""
    found: dict[str, Scalar] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def _numbers(old: Mapping[str, Scalar], new: Mapping[str, Scalar]) -> tuple[NumberChange, ...]:
    return tuple(
        NumberChange(name, old.get(name), new.get(name), any(part in name for part in _TIMING))
        for name in sorted(old.keys() | new.keys(), key=_metric_order)
        if old.get(name) != new.get(name)
    )


_FIRST = ("valid_loss", "loss", "valid_loss_start", "parameters", "active_parameters", "rows", "tokens")


def _metric_order(name: str) -> tuple[int, str]:
    known = _FIRST.index(name) if name in _FIRST else len(_FIRST) + name.startswith("details.")
    return known, name


def _curve(store: Store, record: Record, notes: list[str]) -> dict[int, dict[str, Scalar]]:
    """Return the numbers that a training logged, by step; empty where there are none."""
    if not any(entry.path == "metrics.jsonl" for entry in record.run_files):
        return {}
    path: Path = store.directory(record) / "run" / "metrics.jsonl"
    found: dict[int, dict[str, Scalar]] = {}
    try:
        for line in path.read_text("utf-8").splitlines():
            point = parse_json(line)
            found.setdefault(int(point.pop("step")), {}).update(point)
    except FileNotFoundError:
        notes.append(f"curve: {version_name(record)} has no run/metrics.jsonl any more")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"curve: {path} cannot be read ({error}); `vpmoe verify` says what is wrong with it")
        return {}
    return found


def _checks(store: Store, record: Record) -> dict[str, str]:
    return {finding.check: finding.outcome for finding in store.findings(record)}


def _count(record: Record, what: str) -> int:
    return len(record.fingerprint_payload.get(what, ()))


def _values(tree: Mapping[str, Any]) -> int:
    return sum(_values(value) if isinstance(value, Mapping) and value else 1 for value in tree.values())
