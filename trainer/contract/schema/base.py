"""What every table of a config shares: strict frozen models, and errors that a person can act on."""

import difflib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Path = tuple[str | int, ...]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ConfigError(ValueError):
    """A config that cannot be used as written.

    Attributes:
        problems: One sentence for each thing that is wrong, each naming the full path of its key.
    """

    def __init__(self, problems: str | list[str], *, origin: str = "") -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        head = f"{origin}: " if origin else ""
        body = self.problems[0] if len(self.problems) == 1 else "\n  - ".join(["", *self.problems])
        super().__init__(f"{head}{body}")


class Frozen(BaseModel):
    """A config table: immutable, no unknown keys, no coercion ("8" is not 8, true is not 1)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True
    )


class Pinned(Frozen):
    """A table of sources: its revisions and digests may be empty until the source is used."""

    def missing_pins(self, path: str = "") -> list[str]:
        """Full paths of the pins below `path` that are still empty strings."""
        found: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            key = f"{path}.{name}" if path else name
            if isinstance(value, Pinned):
                found += value.missing_pins(key)
            elif _is_pin(field.metadata) and value == "":
                found.append(key)
            elif isinstance(value, Mapping):
                found += [f'{key}."{item}"' for item, pin in value.items() if pin == ""]
        return found

    def require_pins(self, path: str) -> Self:
        """Return the table, or refuse it when a revision or digest has not been filled in.

        An empty pin lets a config load on a machine that will never fetch the source; it is refused where the
        source is about to be used, because "latest" is not an identity.

        Args:
            path: Where the table stands in the config, for the message (`"sources.synth"`).

        Raises:
            ConfigError: A pin is empty.
        """
        if missing := self.missing_pins(path):
            raise ConfigError(
                f"{', '.join(missing)}: not pinned. This source is about to be used, so write the exact "
                "value (a revision is a 40-digit commit, a sha256 64 hex digits) into the experiment's TOML."
            )
        return self


class NamedTables(Frozen):
    """Tables that are addressed by name (`rungs["vpmoe"]`); those the config leaves out are absent."""

    def __getitem__(self, name: str) -> Any:  # the type differs by name; attribute access is the typed way
        if name not in self:
            kind = type(self).__name__.lower()
            raise ConfigError(
                f"{kind}.{name}: not in this experiment, which has {', '.join(self.names()) or 'none'}"
            )
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in type(self).model_fields and getattr(self, name) is not None

    def get(self, name: str) -> Any:
        """Return the table called `name`, or None."""
        return getattr(self, name) if name in self else None

    def names(self) -> tuple[str, ...]:
        """Names of the tables that are present, in the order of the ladder."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Pairs of name and table, in the order of the ladder."""
        return ((name, getattr(self, name)) for name in self.names())


class Pin:
    """Marks a field whose empty string means "to be filled in before use"."""


def _is_pin(metadata: list[Any]) -> bool:
    return any(isinstance(item, Pin) for item in metadata)


def _commit(value: str) -> str:
    if value and not _COMMIT.fullmatch(value):
        raise ValueError(
            f"found {value!r}; expected the 40 hex digits of a commit (branch and tag names can move)"
        )
    return value


def _sha256(value: str) -> str:
    if value and not _SHA256.fullmatch(value):
        raise ValueError(f"found {value!r}; expected 64 lower-case hex digits")
    return value


Revision = Annotated[str, AfterValidator(_commit), Pin()]
Sha256 = Annotated[str, AfterValidator(_sha256), Pin()]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
RowCap = Annotated[int, Field(ge=-1)]
"""A number of rows or tokens; -1 takes all."""
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]


def plain(model: BaseModel) -> dict[str, Any]:
    """Return the table as JSON values with every default written out, in the order of declaration."""
    return model.model_dump(mode="json", by_alias=True)


def parse[M: BaseModel](
    model: type[M], data: object, *, origin: str = "", source_path: Callable[[Path], Path] = lambda path: path
) -> M:
    """Validate `data` as `model`.

    Args:
        model: The table's class.
        data: Plain values, as TOML or JSON give them.
        origin: File name, for the message.
        source_path: Maps a key path of `data` to the path a person wrote, where tables were inherited.

    Returns:
        The validated table.

    Raises:
        ConfigError: Naming every unknown, missing or wrong key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, data, detail, source_path) for detail in _unknown_first(error)]
        raise ConfigError(list(dict.fromkeys(problems)), origin=origin) from None


def _unknown_first(error: ValidationError) -> list[Any]:
    """Return a misspelt key also leaves the right one missing: name the misspelling first."""
    return sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")


def dotted(path: Path) -> str:
    """`("stages", "a", "curriculum", 0, "until")` as `stages.a.curriculum[0].until`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'
            text += f".{shown}" if text else shown
    return text


def _explain(model: type[BaseModel], data: object, detail: Any, source_path: Callable[[Path], Path]) -> str:
    path, table = _resolve(model, data, detail["loc"])
    key = dotted(source_path(path))
    kind: str = detail["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(model, table, str(path[-1]))}"
    if kind == "missing":
        return f"{key}: missing; it has no default, so the config must set it"
    if kind == "union_tag_not_found":
        return f"{dotted((*source_path(path), 'kind'))}: missing; allowed: {_tags(model, path)}"
    if kind == "union_tag_invalid":
        found = detail["ctx"]["tag"]
        allowed = detail["ctx"]["expected_tags"]
        return f"{dotted((*source_path(path), 'kind'))}: found {found!r}; allowed: {allowed}"
    if kind == "literal_error":
        return f"{key}: found {detail['input']!r}; allowed: {detail['ctx']['expected']}"
    if kind == "value_error":
        reason = str(detail["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    return f"{key}: found {detail['input']!r}; {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _nearest(model: type[BaseModel], table: type[BaseModel] | None, name: str) -> str:
    siblings = _keys(table) if table is not None else []
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"the nearest valid key is {close[0]!r}"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in reversed(list(_all_keys(model)))}
    if close := difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.85):
        return f"the nearest valid key is {elsewhere[close[0]]!r}; valid here: {', '.join(siblings)}"
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.0):
        return f"the nearest valid key is {close[0]!r}; valid here: {', '.join(siblings)}"
    return "no keys are allowed here"


def _keys(table: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in table.model_fields.items()]


def _all_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in table.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        yield path
        for _, inner in _models(field.annotation):
            yield from _all_keys(inner, f"{path}.")


def _models(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    """Return the table classes that an annotation admits, each with its `kind` tag ("" when it has none)."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [found for arg in get_args(annotation) for found in _models(arg)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        return [
            (
                get_args(kind.annotation)[0] if kind and get_origin(kind.annotation) is Literal else "",
                annotation,
            )
        ]
    return []


def _tags(model: type[BaseModel], path: Path) -> str:
    annotation: Any = None
    table: type[BaseModel] = model
    for part in path:
        annotation = _annotation(table, str(part))
        found = _models(annotation)
        table = found[0][1] if found else table
    return ", ".join(repr(tag) for tag, _ in _models(annotation))


def _annotation(table: type[BaseModel], key: str) -> Any:
    for name, field in table.model_fields.items():
        if key in (name, field.alias):
            return field.annotation
    return None


def _resolve(model: type[BaseModel], data: object, loc: Path) -> tuple[Path, type[BaseModel] | None]:
    """Return the key path of a location of pydantic's, without union tags, and the table of its last key."""
    path: list[str | int] = []
    annotation: Any = model
    holder: type[BaseModel] | None = None
    for part in loc:
        found = _models(annotation)
        tagged = dict(found)
        if len(found) > 1 and part in tagged:  # a union's tag, not a key
            annotation = tagged[str(part)]
            continue
        if found:
            holder = found[0][1]
            path.append(part)
            annotation = _annotation(holder, str(part))
            continue
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        container = get_origin(annotation)
        if container is dict:
            path.append(part)
            annotation, holder = get_args(annotation)[1], None
        elif isinstance(part, int):
            path.append(part)
            annotation = get_args(annotation)[0] if container is tuple else None
        # Anything else is pydantic's name for a branch of a plain union, which nobody wrote.
    return tuple(path), holder
