"""Where the rows stand when each reads one token: `Rows` for a step whose counts are tensors.

Nothing here depends on a count's value, so that one graph serves all tokens; only what a closing cell costs is spared
the other tokens, by `branch`. Buffers have a fixed number of columns, filled from the left or in a circle.

Legend: B rows, H heads, n numbers of a column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Place:
    """One token of every row.

    Args:
        read: tokens that each row's stream has read before, int64 [B].
        active: bool [B], False for rows that take no token in this step: nothing of theirs changes. None: all do.
        device: of the tensors to come.
        appends: columns may be added to buffers in place, where no column of the same cell is there yet: whoever still
            looks at the state before sees no difference.
        overwrites: columns of circles may be written over in place: nobody looks at the state before any more.

    Attributes:
        closes: whether `ends` has found a row whose cell is complete; never known where counts are not looked at.
    """

    def __init__(
        self,
        read: Tensor,
        active: Tensor | None,
        device: torch.device,
        *,
        appends: bool = False,
        overwrites: bool = False,
    ):
        self.counts, self.active, self.appends, self.overwrites = read, active, appends, overwrites
        self.read = read.to(device)
        self.closes = False
        self._known: dict[tuple, object] = {}

    @property
    def after(self) -> Tensor:
        """Tokens read after the step, where ``read`` was."""
        return self.counts + (1 if self.active is None else self.active.to(self.counts))

    def once(self, key: tuple, make: Callable[[], T]) -> T:
        """What ``make`` gives, made for the first layer that asks."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]  # type: ignore[return-value]

    def column(self, size: int, offset: int = 0) -> Tensor:
        """The token's column in cells of ``size`` tokens, of streams that began ``offset`` tokens earlier; [B, 1]."""
        return self.once(("column", size, offset), lambda: ((self.read + offset) % size).unsqueeze(1))

    def mark(self, size: int, offset: int, width: int, dtype: torch.dtype) -> Tensor:
        """1 at the token's column, 0 elsewhere; [B, 1, width], ``width`` ≥ ``size``."""

        def make() -> Tensor:
            return torch.eq(torch.arange(width, device=self.read.device), self.column(size, offset)).to(dtype)

        return self.once(("mark", size, offset, width, dtype), make).unsqueeze(1)

    def ends(self, size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Rows whose cell of ``size`` tokens is complete with this token, bool [B], and whether there is one, []."""
        return self.once(("ends", size, offset), lambda: self._ends(size, offset))

    def _ends(self, size: int, offset: int) -> tuple[Tensor, Tensor]:
        last = (self.counts + offset) % size == size - 1
        rows = last.to(self.read.device)
        if self.active is not None:
            rows = rows & self.active
            last = last & self.active if self.active.device == last.device else last
        some = last.any()
        if not torch.compiler.is_compiling():
            self.closes = self.closes or bool(some)
        return rows, some

    def extends(self, size: int, offset: int = 0) -> bool:
        """May the token's column be written in place, in cells of ``size`` tokens that begin at column 0?"""
        if not self.appends:
            return False

        def begins() -> bool:
            first = (self.counts + offset) % size == 0
            if self.active is not None and self.active.device == first.device:
                first = first & self.active
            return bool(first.any())

        return not self.once(("begins", size, offset), begins)

    def put(self, buffer: Tensor, columns: Tensor, value: Tensor, in_place: bool) -> Tensor:
        """``buffer`` [B, H, C, n] with ``value`` [B, H, k, n] at ``columns`` [B, k] of the rows that are active."""
        index = columns.view(columns.shape[0], 1, columns.shape[1], 1).expand_as(value)
        if self.active is not None:
            value = torch.where(self.active.view(-1, 1, 1, 1), value, buffer.gather(2, index))
        if columns.shape[0] == 1:
            return (buffer.index_copy_ if in_place else buffer.index_copy)(2, columns[0], value)
        return (buffer.scatter_ if in_place else buffer.scatter)(2, index, value)

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        """``new`` for the rows that are active, else ``old``; [B, ...]."""
        return new if self.active is None else torch.where(_wide(self.active, new), new, old)


def branch(some: Tensor, then: Callable[..., T], otherwise: Callable[..., T], operands: tuple) -> T:
    """``then(*operands)`` where ``some`` is True, else ``otherwise(*operands)``: both of the same shapes.

    In a graph it is a branch of the graph, whose results must not be its arguments: ``otherwise`` copies there.
    """
    if torch.compiler.is_compiling():
        return torch.cond(some, then, otherwise, operands)
    return then(*operands) if bool(some) else otherwise(*operands)


def unchanged(x: Tensor) -> Tensor:
    """x, as what a branch may return."""
    return x.clone() if torch.compiler.is_compiling() else x


def choose(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the rows [B] that are True, else ``old``; [B, ...] or [B·H, ...]."""
    groups = new.shape[0] // rows.shape[0]
    return torch.where(_wide(rows.repeat_interleave(groups) if groups > 1 else rows, new), new, old)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view((-1,) + (1,) * (like.dim() - 1))
