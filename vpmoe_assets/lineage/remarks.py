"""What every view of lineage says beside an artifact: by whose word it counts, and what became of that word.

An artifact may count for present code by an acceptance of its own; or it was made from one that did, however
far up. It may have been adopted, or made from what was. All are remarks, and every view (the command, the UI,
the index, reports) takes them from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vpmoe_assets.lineage.acceptance import Acceptance, acceptances, acceptances_of
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import InputRef, Record
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store


@dataclass(frozen=True)
class Remark:
    """An acceptance, beside an artifact that counts by it or was made from one that did.

    Attributes:
        experiment: Of the accepted artifact.
        asset: Of the accepted artifact.
        version: Of the accepted artifact.
        statement: Id of the acceptance.
        found: The acceptance; None where what was said is gone.
        own: Whether it is the artifact's own, and not that of one it came from.
    """

    experiment: str
    asset: str
    version: str
    statement: str
    found: Acceptance | None
    own: bool

    @property
    def state(self) -> str:
        """`active`, `reproduced`, `withdrawn`, `refuted`, or `lost` where the statement is gone."""
        if self.found is None:
            return "lost"
        ended = self.found.ended
        if ended is not None and (ended.kind == "refuted" or self.found.reproduced is None):
            return ended.kind
        return "active" if self.found.reproduced is None else "reproduced"

    @property
    def void(self) -> bool:
        """Whether nobody stands by it any more: withdrawn and never reproduced, refuted, or lost."""
        return self.state in ("withdrawn", "refuted", "lost")

    def line(self) -> str:
        """Return it for people: whose word, when, why, what it covers, and what became of it."""
        what = "accepted" if self.own else f"made from {self.asset}@{self.version}, accepted"
        if self.found is None:
            return f"{what} by statement {self.statement[:12]}, which is NO LONGER IN THE STORE"
        said = self.found.statement
        covers = [*self.found.difference.lines(), *(f"NOT SHOWN: {each}" for each in said.body["unknown"])]
        text = (
            f"{what} as the same by {said.author} on {said.time[:10]} ({self.statement[:12]}), because: "
            f"{said.reason}. It covers {'; '.join(covers) or 'no difference'}"
        )
        return text + self._outcome()

    def short(self) -> str:
        """Return it for a table."""
        return f"{'' if self.own else f'{self.asset} was '}accepted ({self.state})"

    def _outcome(self) -> str:
        assert self.found is not None
        text = ""
        if (made := self.found.reproduced) is not None:
            text += f". Reproduced by {made.body['by']}, which came out the same"
        if (ended := self.found.ended) is None:
            return text
        if ended.kind == "refuted":
            return text + f". REFUTED by {ended.body['by']}, which came out different"
        return text + f". WITHDRAWN by {ended.author} on {ended.time[:10]}, because: {ended.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        said = None if self.found is None else self.found.statement
        ended = None if self.found is None else self.found.ended
        return {
            "artifact": version_name(self),
            "statement": self.statement,
            "own": self.own,
            "state": self.state,
            "author": said and said.author,
            "time": said and said.time,
            "reason": said and said.reason,
            "fingerprint": said and said.body["fingerprint"],
            "difference": said and said.body["difference"],
            "unknown": said and said.body["unknown"],
            "ended_by": ended and {"author": ended.author, "time": ended.time, "reason": ended.reason},
            "text": self.line(),
        }


@dataclass(frozen=True)
class Adopted(Remark):
    """That an artifact, or one that it was made from, was made elsewhere and adopted.

    Attributes:
        said: The statement.
    """

    said: Statement | None = None

    @property
    def state(self) -> str:
        """`adopted`: it stays so."""
        return "adopted"

    def line(self) -> str:
        """Return it for people."""
        assert self.said is not None
        what = "adopted" if self.own else f"made from {self.asset}@{self.version}, adopted"
        pickles = self.said.body.get("trusted") or ()
        trusted = f", with pickles that were trusted ({', '.join(pickles)})" if pickles else ""
        why = f", because: {self.said.reason}" if self.said.reason else ""
        place = self.said.body.get("from", "elsewhere")
        return f"{what} by {self.said.author} on {self.said.time[:10]} from {place}{trusted}{why}"

    def short(self) -> str:
        """Return it for a table."""
        return "adopted" if self.own else f"{self.asset} was adopted"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        assert self.said is not None
        said = {"author": self.said.author, "time": self.said.time, "reason": self.said.reason}
        return super().to_dict() | said


class Remarks:
    """The remarks on the artifacts of one store, each looked up once.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._own: dict[tuple[str, str], tuple[Remark, ...]] = {}
        self._inherited: dict[str, Mapping[str, Remark]] = {}

    def about(self, record: Record) -> list[Remark]:
        """Return all remarks on an artifact: its own acceptances, then those of what it came from."""
        return [*self.own(record), *self.inherited(record)]

    def own(self, record: Record | Head) -> tuple[Remark, ...]:
        """Return what was said of an artifact: that it was adopted, and its acceptances."""
        key = (record.version, record.record_digest)
        if key not in self._own:
            self._own[key] = tuple(self._said(record))
        return self._own[key]

    def _said(self, record: Record | Head) -> list[Remark]:
        names = (record.experiment, record.asset, record.version)
        said = self._store.statements.about_digest(record.experiment, record.asset, record.record_digest)
        adopted = [Adopted(*names, each.id, None, True, each) for each in said if each.kind == "adopted"]
        return adopted + [
            Remark(*names, found.statement.id, found, True)
            for found in acceptances_of(record, self._store.statements)
        ]

    def inherited(self, record: Record | Head) -> list[Remark]:
        """Return what was said of artifacts that this one came from, nearest first.

        That is by whose word they counted, and which of them were adopted.
        """
        return list(self._of_inputs(record).values())

    def made_under(self, experiment: str, statement: str) -> list[Head]:
        """Return what was made from an artifact that counted by an acceptance, and all that came of it."""
        return [
            head
            for head in self._store.heads(experiment)
            if any(remark.statement == statement for remark in self.inherited(head))
        ]

    def on(self, experiment: str, reference: InputRef) -> Remark | None:
        """Return the acceptance by which an input counted when it was used, or None.

        Args:
            experiment: Of the artifact that was made from it.
            reference: By which that one's record names it.
        """
        if reference.acceptance is None:
            return None
        statements = self._store.statements
        record = self._store.head(experiment, reference)
        said = statements.about_digest(experiment, reference.asset, reference.record_digest)
        known = acceptances(said) if record is None else acceptances_of(record, statements)
        found = {each.statement.id: each for each in known}.get(reference.acceptance)
        return Remark(experiment, reference.asset, reference.version, reference.acceptance, found, own=False)

    def _of_inputs(self, record: Record | Head) -> Mapping[str, Remark]:
        if record.record_digest not in self._inherited:
            self._inherited[record.record_digest] = {}  # records cannot form a circle; forged ones could
            found: dict[str, Remark] = {}
            for reference in record.inputs:
                if (remark := self.on(record.experiment, reference)) is not None:
                    found.setdefault(remark.statement, remark)
            for reference in record.inputs:
                if (parent := self._store.head(record.experiment, reference)) is not None:
                    for own in self.own(parent):
                        if isinstance(own, Adopted):
                            found.setdefault(own.statement, replace(own, own=False))
                    for statement, remark in self._of_inputs(parent).items():
                        found.setdefault(statement, remark)
            self._inherited[record.record_digest] = found
        return self._inherited[record.record_digest]
