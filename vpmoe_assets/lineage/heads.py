"""The head of a record: the small facts by which it is looked up, without its lists of files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, overload

from pydantic import Field

from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.layout import version_order
from vpmoe_assets.lineage.record import Frozen, InputRef, Origin, Record, Scalar


class Head(Frozen):
    """What a record is looked up by; fields as in the record.

    Attributes:
        size: Bytes of the payload.
    """

    schema_: Literal["vpmoe.artifact/1", "vpmoe.artifact/2"] = Field(alias="schema")
    experiment: str
    asset: str
    version: str
    sequence: int
    published_utc: str
    started_utc: str
    finished_utc: str
    fingerprint: str
    digest: str
    record_digest: str
    size: int
    inputs: tuple[InputRef, ...]
    metrics: dict[str, Scalar]
    original: Origin | None

    @classmethod
    def of(cls, record: Record) -> Self:
        """Return the head of a record."""
        fields = {name: getattr(record, name) for name in cls.model_fields}
        return cls.model_validate({"schema": fields.pop("schema_"), **fields})

    @property
    def own_size(self) -> int:
        """Bytes of the payload that no other version had before it."""
        return 0 if self.original else self.size


class Versions(Sequence[Head]):
    """The heads of an asset's versions, oldest first; one that was not read yet is read when asked for.

    Attributes:
        record_digests: Of their records.
        own_size: Bytes of all payloads; files that a version only names again are not counted.
    """

    def __init__(self, heads: Iterable[tuple[str, int, Head | Callable[[], Head]]] = ()) -> None:
        """Keep record digest, own size, and head, or what returns it, of each version."""
        found = list(heads)
        self.record_digests = tuple(digest for digest, _, _ in found)
        self.own_size = sum(size for _, size, _ in found)
        self._heads = [head for _, _, head in found]

    @classmethod
    def of(cls, heads: Iterable[Head]) -> Self:
        """Return heads that were read, oldest first."""
        return cls((head.record_digest, head.own_size, head) for head in heads)

    def __len__(self) -> int:
        return len(self._heads)

    @overload
    def __getitem__(self, place: int) -> Head: ...

    @overload
    def __getitem__(self, place: slice) -> list[Head]: ...

    def __getitem__(self, place: int | slice) -> Head | list[Head]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        head = self._heads[place]
        if not isinstance(head, Head):
            head = self._heads[place] = head()
        return head

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Versions) and self.record_digests == other.record_digests

    def __hash__(self) -> int:
        return hash(self.record_digests)


@dataclass(frozen=True)
class Damaged:
    """A version whose record cannot be read."""

    experiment: str
    asset: str
    version: str
    error: RecordError


def newest(heads: Sequence[Head], damaged: Sequence[Damaged]) -> Head | None:
    """Return the version with the highest sequence number, or None.

    Args:
        heads: By sequence.
        damaged: Versions of the same asset whose record cannot be read.

    Raises:
        RecordError: A version that may be newer has an unreadable record; falling back to an older one
            without a word would be worse than stopping.
    """
    latest = heads[-1] if heads else None
    for candidate in damaged:
        if latest is None or version_order(candidate.version) > version_order(latest.version):
            raise candidate.error
    return latest
