"""The order in which queries, keys and values share one vector."""

import torch


def split_qkv(
    mixed: torch.Tensor, groups: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split Megatron's interleaved layout: for each group its query heads, then its key, then its value.

    Args:
        mixed: `[S, B, (heads + 2 · groups) · D]`.
        groups: key/value heads in `mixed`.
        head_dim: D.

    Returns:
        Query `[S, B, heads, D]`, key and value `[S, B, groups, D]`.
    """
    per_group = mixed.reshape(
        *mixed.shape[:-1], groups, -1, head_dim
    )  # [S, B, groups, heads per group + 2, D]
    query = per_group[..., :-2, :].flatten(-3, -2)
    return query, per_group[..., -2, :], per_group[..., -1, :]


def interleave_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `split_qkv` on any leading axes.

    Args:
        query: `[…, heads, D]`.
        key: `[…, groups, D]`.
        value: `[…, groups, D]`.

    Returns:
        `[…, (heads + 2 · groups) · D]`.
    """
    groups, dim = key.shape[-2:]
    query = query.reshape(*query.shape[:-2], groups, -1, dim)
    return torch.cat((query, key.unsqueeze(-2), value.unsqueeze(-2)), dim=-2).flatten(-3)
