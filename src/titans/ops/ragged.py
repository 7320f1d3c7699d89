"""Rows of different lengths in one batch, without loops over rows.

Inside the library a ragged batch is right-padded: row b's real tokens are columns 0 .. lengths[b]-1. Whatever a row
must remember of its past is kept right-aligned. So "past, then new tokens" is one concatenation for all rows at once.
Lengths are tuples of plain integers: nothing here waits for an accelerator, and uniform batches cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def columns(x: Tensor, start: Sequence[int], width: int) -> Tensor:
    """Columns start[b] .. start[b]+width-1 of every row; x [B, T, ...] -> [B, width, ...].

    Columns outside x repeat its first or last one: callers mask them.
    """
    first = start[0]
    if all(s == first for s in start) and first >= 0 and first + width <= x.shape[1]:
        return x[:, first : first + width]
    index = torch.tensor(start, device=x.device).unsqueeze(1) + torch.arange(width, device=x.device)
    index = index.clamp(0, max(x.shape[1] - 1, 0))
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), index]


def valid(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """[B, width] bool: is this column one of the row's first ``lengths[b]``?"""
    return torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)


def compact(mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Where a mask's real tokens go when each row is shifted to the left.

    Args:
        mask: [B, T] bool, True for real tokens.

    Returns:
        ``order`` [B, T] int64: compacted column j holds original column ``order[b, j]`` (padding comes last), and the
        number of real tokens per row.
    """
    order = torch.argsort(mask.logical_not().to(torch.int8), dim=1, stable=True)
    return order, tuple(mask.sum(1).tolist())


def take(x: Tensor, order: Tensor) -> Tensor:
    """x [B, T, ...] with its columns in ``order`` [B, T]."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), order]


def restore(x: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Undo ``take`` and set masked columns to zero."""
    back = take(x, torch.argsort(order, dim=1))
    return back.masked_fill(~mask.view(mask.shape + (1,) * (x.dim() - 2)), 0)
