"""The arithmetic of one map of a memory network, told by its rank: a matrix [G, out, in] or a diagonal [G, width].

Legend: G rows (batch times heads), n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Dense:
    """A matrix map; the gradient of one token is the rank-one δ aᵀ."""

    @staticmethod
    def apply(weight: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(x, weight.mT)

    @staticmethod
    def transpose(weight: Tensor, error: Tensor) -> Tensor:
        return torch.bmm(error, weight)

    @staticmethod
    def write(base: Tensor, a: Tensor, error: Tensor, share: Tensor) -> Tensor:
        """base - Σ_i share_i δ_i a_iᵀ, share [G, n, 1 or out]."""
        return torch.baddbmm(base, (share * error).mT, a, alpha=-1)

    @staticmethod
    def gradient(a: Tensor, error: Tensor) -> Tensor:
        """Of one token, [G, in] and [G, out]: the gradient in full."""
        return error.unsqueeze(-1) * a.unsqueeze(-2)

    @staticmethod
    def surprise(a: Tensor, error: Tensor) -> Tensor:
        """‖g_i‖² per token, [G, n]."""
        return a.square().sum(-1) * error.square().sum(-1)


class Diagonal:
    """An elementwise map; the gradient of one token is δ ⊙ a."""

    @staticmethod
    def apply(weight: Tensor, x: Tensor) -> Tensor:
        return weight.unsqueeze(-2) * x

    transpose = apply

    @staticmethod
    def write(base: Tensor, a: Tensor, error: Tensor, share: Tensor) -> Tensor:
        return base - (share * error * a).sum(-2)

    @staticmethod
    def gradient(a: Tensor, error: Tensor) -> Tensor:
        return error * a

    @staticmethod
    def surprise(a: Tensor, error: Tensor) -> Tensor:
        return (a * error).square().sum(-1)


def map_kind(weight: Tensor) -> type[Dense] | type[Diagonal]:
    """The arithmetic of a map."""
    return Dense if weight.dim() == 3 else Diagonal


def wide(gate: Tensor, weight: Tensor) -> Tensor:
    """A number per row or output channel, [G, 1 or out], in a shape that multiplies a map's weights."""
    return gate.unsqueeze(-1) if weight.dim() == 3 else gate


def retain(retained: Tensor | None, weight: Tensor) -> Tensor:
    """P A."""
    return weight if retained is None else wide(retained, weight) * weight


def where_rows(rows: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Per map, ``new`` for the rows [G] that are True and ``old`` for the others."""
    return tuple(torch.where(rows.view((-1,) + (1,) * (n.dim() - 1)), n, o) for n, o in zip(new, old, strict=True))
