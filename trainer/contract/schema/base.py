"""What every table of a config shares: strict frozen models, read from plain values and written as such."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from trainer.contract.schema.explain import Path, explain, unknown_first

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
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        defer_build=True,  # a verb that reads one experiment builds one validator, not ninety
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if any(isinstance(item, Neutral) for item in field.metadata) and field.is_required():
                raise TypeError(f"{cls.__name__}.{name}: a Neutral key needs a default, its neutral value")


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


class Neutral:
    """Marks a key that came later, or that is for some runs only, whose default means doing without it.

    At that value `plain` leaves the key out, so a recipe that does not ask for it has the fingerprint that it
    had before there was the key, and what was made is reused; at any other value the key is part of the
    identity like all others:

        dropout_seed: Annotated[Count, Neutral()] = 0

    Use it for a key added to a table of which records exist, when its default changes no byte of what they
    hold. A default that does change bytes is no neutral value: leave the mark out, and everything is made
    again. The default of a marked key must never change, nor may the mark be taken away: records from before
    would then be read as made with another value.
    """


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
    """Return the table as JSON values, in the order of declaration: what a fingerprint is taken over.

    Defaults are written out. Left out are an optional key that is not set (None, its default), and a
    `Neutral` key at its neutral value; `parse` gives both back.

    Args:
        model: The table.
    """
    return _pruned(model, model.model_dump(mode="json", by_alias=True))


def _pruned(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            field.alias or name: _pruned(getattr(value, name), dumped[field.alias or name])
            for name, field in type(value).model_fields.items()
            if not _is_absent(field, getattr(value, name))
        }
    if isinstance(value, Mapping):
        return {key: _pruned(value[key], item) for key, item in dumped.items()}
    if isinstance(value, tuple | list):
        return [_pruned(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


def _is_absent(field: FieldInfo, value: Any) -> bool:
    if any(isinstance(item, Neutral) for item in field.metadata):
        return bool(value == field.default)
    return value is None and field.default is None


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
        problems = [explain(model, data, detail, source_path) for detail in unknown_first(error)]
        raise ConfigError(list(dict.fromkeys(problems)), origin=origin) from None
