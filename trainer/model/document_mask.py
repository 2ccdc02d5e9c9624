"""Where the documents of a packed row are kept apart: which earlier tokens a token sees.

A row holds several documents and then padding; `doc_id` numbers the document of each token and comes with
the row from `trainer.data.kd` and `trainer.data.text`. A token sees itself and the tokens of its own document
before it, in a local layer the last W of them. No mask is passed from layer to layer: attention makes its
own, block by block, from `doc_id`.

Nothing else lets documents meet: norms, projections, routing and experts work token by token, and positions
start again in each document.
"""

import torch

PADDING = -1
"""`doc_id` of a token that belongs to no document; it sees itself only."""


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
