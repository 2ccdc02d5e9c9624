"""Where the documents of a packed row are kept apart: which earlier tokens a token sees.

A row holds several documents and then padding; `doc_id` numbers the document of each token and comes with
the row from `trainer.data.kd` and `trainer.data.text`. A token sees itself and the tokens of its own document
before it, in a local layer the last W of them. No mask is passed from layer to layer: attention makes its
own, block by block, from `doc_id`.

Nothing else lets documents meet: norms, projections, routing and experts work token by token, and positions
start again in each document.
"""

from dataclasses import dataclass, field

import torch

PADDING = -1
"""`doc_id` of a token that belongs to no document; it sees itself only."""


@dataclass
class Documents:
    """The documents of the rows of one pass, in the two forms in which attention asks for them.

    Attributes:
        doc_id: int64 `[B, S]`; -1 is padding, which sees itself only.
        given: int32, `borders` where whoever runs the pass has them already, as a captured pass must: with
            repeated last entries, they may be longer than the documents are many.
    """

    doc_id: torch.Tensor
    given: torch.Tensor | None = field(default=None, repr=False)

    @property
    def borders(self) -> torch.Tensor:
        """int32 `[n + 1]`: places of `[B · S]` at which runs of one document begin, then `B · S`.

        Row after row; a run of padding counts as a document, whose tokens see each other: nobody reads what
        they see. Asking for it the first time waits for the device, which alone knows how many there are.
        """
        if self.given is None:
            starts = document_starts(self.doc_id).flatten().nonzero().squeeze(1)
            self.given = torch.nn.functional.pad(starts, (0, 1), value=self.doc_id.numel()).int()
        return self.given


def document_starts(doc_id: torch.Tensor) -> torch.Tensor:
    """Bool `[B, S]`, True where another document than that of the token before begins, or a row."""
    starts = torch.ones_like(doc_id, dtype=torch.bool)
    starts[:, 1:] = doc_id[:, 1:] != doc_id[:, :-1]
    return starts


def fill_borders(doc_id: torch.Tensor, borders: torch.Tensor) -> None:
    """Write the borders of at most `len(borders) - 1` documents into a tensor, without asking the device.

    Args:
        doc_id: int64 `[B, S]`, with no more runs of one document than there is room for.
        borders: int32 `[n + 1]`, on the same device; what is left over is filled with `B · S`.
    """
    starts = document_starts(doc_id).flatten()
    places = torch.where(starts, starts.cumsum(0) - 1, len(borders))
    room = torch.full((len(borders) + 1,), doc_id.numel(), dtype=torch.int32, device=doc_id.device)
    room[places] = torch.arange(doc_id.numel(), dtype=torch.int32, device=doc_id.device)
    borders.copy_(room[:-1])


def within_reach(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a key is not ahead of its query, and inside the window.

    Args:
        distance: Integer, any shape: position of the query minus position of the key.
        window: Keys that a query sees, itself included; None: all.

    Returns:
        Bool, of the shape of `distance`.
    """
    reached = distance >= 0
    return reached if window is None else reached & (distance < window)


def document_mask(
    queries: torch.Tensor, keys: torch.Tensor, doc_id: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Say which keys of a packed row each query sees: not ahead, inside the window, of the same document.

    Args:
        queries: int64 `[q]`, places in the row.
        keys: int64 `[k]`, places in the row.
        doc_id: int64 `[B, S]`.
        window: Keys that a query sees, itself included; None: all of its document.

    Returns:
        Bool `[B, q, k]`; padding sees itself only.
    """
    distance = queries[:, None] - keys[None, :]
    of_query, of_key = doc_id[:, queries, None], doc_id[:, None, keys]
    same = (of_query == of_key) & (of_query != PADDING)
    return (within_reach(distance, window) & same) | (distance == 0)
