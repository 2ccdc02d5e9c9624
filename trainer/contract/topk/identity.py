"""What a store speaks of, and by whom: what must be the same wherever its shards are used together."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.topk.errors import StoreError

MOST_TOPK = 1 << 18
MOST_VOCABULARY = 1 << 24
"""Limits of the format: what a reader allocates for a file depends on these numbers in it."""


@dataclass(frozen=True)
class StoreIdentity:
    """The teacher, the data and the terms of a store.

    Attributes:
        teacher: Plain JSON: `kind`, `reasoning_mode`, and `digest` (an artifact) or `model` and `revision`.
        tokenizer_sha256: Of the tokenizer that teacher and data share.
        dataset_digest: Content digest of the data set whose sequences are scored.
        subset_fraction: Share of its training split that is scored.
        vocabulary: Token ids are below it.
        topk: K, the most ids of a position.
        mass: Ids end where they reach this mass; None: there are K.
        tail_draws: Draws from the tail at each position.
        logprob_error: Bound of the error of every log-prob in the store.
    """

    teacher: Mapping[str, Any]
    tokenizer_sha256: str
    dataset_digest: str
    subset_fraction: float
    vocabulary: int
    topk: int
    mass: float | None = None
    tail_draws: int = 0
    logprob_error: float = 0.01

    def __post_init__(self) -> None:
        for name, low, high in (
            ("vocabulary", 1, MOST_VOCABULARY),
            ("topk", 1, min(self.vocabulary, MOST_TOPK)),
            ("tail_draws", 0, 255),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise StoreError(f"{name} = {value}: expected a number from {low} to {high}")
        if not 0.001 <= self.logprob_error <= 0.05:
            raise StoreError(f"logprob_error = {self.logprob_error}: expected a bound from 0.001 to 0.05")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise StoreError(f"mass = {self.mass}: expected a probability, or none for a fixed K")

    @cached_property
    def document(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "teacher": dict(self.teacher)
        }

    @cached_property
    def digest(self) -> str:
        """sha256 of the document: what binds a shard to its store."""
        return sha256_json(self.document)
