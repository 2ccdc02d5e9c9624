"""What a person is told of a key that is unknown, missing or wrong: path, value found, what is allowed."""

import difflib
import re
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]


def unknown_first(error: ValidationError) -> list[Any]:
    """Return the errors with unknown keys in front: a misspelt key also leaves the right one missing."""
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


def explain(model: type[BaseModel], data: object, detail: Any, source_path: Callable[[Path], Path]) -> str:
    """Say in one sentence what is wrong, where, and what would be right.

    Args:
        model: The table that was to be read.
        data: What was given.
        detail: One of pydantic's errors.
        source_path: Maps a key path of `data` to the path that a person wrote.
    """
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
