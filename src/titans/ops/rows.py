"""Rows of different lengths in one batch: where every token of a call stands, worked out once.

Inside the library a batch is right-padded: row b's real tokens are columns 0 .. counts[b]-1. A row is a stream that
goes on or begins; it may hold further documents, each of which begins anew. Whatever must be remembered of the past is
kept right-aligned. Everything here is plain integers: nothing waits for an accelerator, and uniform batches cost
nothing.

Legend: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What every layer needs to know about the rows of a call.

    Attributes:
        seen: tokens that each row's stream had read before; 0: it begins here.
        counts: real tokens of each row.
        tokens: T.
        starts: for each row the columns, above 0, at which further documents begin; () where no row has any.
    """

    seen: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: int
    starts: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def whole(cls, seen: Sequence[int], tokens: int) -> Rows:
        """Rows without padding and without further documents."""
        return cls(tuple(seen), (tokens,) * len(seen), tokens)

    def of_documents(self, ids: Tensor) -> Rows:
        """The same rows with a further document wherever ``ids`` [B, T] differs from the column before."""
        changes = (ids[:, 1:] != ids[:, :-1]).tolist()
        starts = tuple(
            tuple(i + 1 for i, new in enumerate(row) if new and i + 1 < n)
            for row, n in zip(changes, self.counts, strict=True)
        )
        return replace(self, starts=starts if any(starts) else ())

    @property
    def full(self) -> bool:
        """No padding and no further documents."""
        return not self.starts and all(n == self.tokens for n in self.counts)

    @property
    def begins(self) -> tuple[bool, ...]:
        """Rows in which a stream begins in this call: in the first column, or further on."""
        further = self.starts or ((),) * len(self.seen)
        return tuple(n > 0 and (s == 0 or bool(f)) for s, n, f in zip(self.seen, self.counts, further, strict=True))

    @property
    def after(self) -> tuple[int, ...]:
        """Tokens that each row's last stream has read after this call."""
        return tuple(last.seen + last.count for *_, last in map(self.documents, range(len(self.seen))))

    def documents(self, row: int) -> list[Document]:
        """The streams of a row in order; at least one, whose count is 0 where the row has no real token."""
        edges = [0, *(self.starts[row] if self.starts else ()), self.counts[row]]
        seen = [self.seen[row], *[0] * (len(edges) - 2)]
        return [Document(a, b - a, s) for a, b, s in zip(edges[:-1], edges[1:], seen, strict=True)]

    def positions(self, device: torch.device, modulo: int | None = None) -> Tensor:
        """Place of every column in its stream, [T] where all rows agree, else [B, T], within cells of ``modulo``."""
        columns = torch.arange(self.tokens, device=device)
        if not self.starts and len(set(self.seen)) == 1:
            positions = self.seen[0] + columns
        else:
            positions = torch.tensor(self.seen, device=device).unsqueeze(1) + columns
            if self.starts:
                first = self.document_starts(device)
                positions = torch.where(first > 0, columns - first, positions)
        return positions if modulo is None else positions % modulo

    def document_starts(self, device: torch.device) -> Tensor:
        """First column of every column's document in this call, [B, T]."""
        marks = torch.zeros(len(self.seen), self.tokens, dtype=torch.int64)
        for row, columns in enumerate(self.starts):
            marks[row, list(columns)] = torch.tensor(columns, dtype=torch.int64)
        return marks.cummax(1).values.to(device)


@dataclass(frozen=True)
class Document:
    """One stream's part of a row: its first column, its tokens, and how many it had read before."""

    start: int
    count: int
    seen: int


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Column index[b, j] of every row b; x [G, T, ...], index [B, columns] -> [G, columns, ...].

    G is a multiple of B, rows in groups of G / B. Where the index is negative some real token's values stand, so that
    nothing undefined enters the arithmetic.
    """
    rows, width = x.shape[:2]
    if not width or not index.shape[1]:
        return x.new_zeros(rows, index.shape[1], *x.shape[2:])
    some = index[index >= 0]
    empty = int(some[0]) + int((index >= 0).nonzero()[0, 0]) * (rows // index.shape[0]) * width if len(some) else 0
    flat = index.repeat_interleave(rows // index.shape[0], 0) + width * torch.arange(rows).unsqueeze(1)
    flat = flat.masked_fill(index.repeat_interleave(rows // index.shape[0], 0) < 0, empty)
    # Whole rows of a matrix: autograd adds them up in one pass, where indexing would fill a tensor of zeros.
    return x.flatten(0, 1).index_select(0, flat.flatten().to(x.device)).unflatten(0, (rows, index.shape[1]))


def columns(x: Tensor, start: Sequence[int], width: int) -> Tensor:
    """Columns start[b] .. start[b]+width-1 of every row; x [B, T, ...] -> [B, width, ...].

    Columns outside x repeat its first or last one: callers mask them.
    """
    first = start[0]
    if all(s == first for s in start) and first >= 0 and first + width <= x.shape[1]:
        return x[:, first : first + width]
    if not x.shape[1]:
        return x.new_zeros(x.shape[0], width, *x.shape[2:])
    index = torch.tensor(start).unsqueeze(1) + torch.arange(width)
    return gather(x, index.clamp(0, x.shape[1] - 1))


def valid(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """[B, width] bool: is this column one of the row's first ``lengths[b]``?"""
    return torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)


def flags(rows: Sequence[bool], like: Tensor) -> Tensor:
    """One flag per row as a bool tensor that broadcasts against ``like`` [G, ...], whose rows come in groups."""
    flat = torch.tensor(rows, device=like.device).repeat_interleave(like.shape[0] // len(rows))
    return flat.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a masked batch go when each row is shifted to the left.

    Attributes:
        order: compacted column j holds original column order[b, j]; padding comes last, [B, T].
        mask: True for real tokens, [B, T].
        counts: real tokens per row.
    """

    order: Tensor
    mask: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        order = torch.argsort(mask.logical_not().to(torch.int8), dim=1, stable=True)
        return cls(order, mask, tuple(mask.sum(1).tolist()))

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with every row's real tokens in front; where padding stood, some real token's values."""
        padding = torch.arange(self.order.shape[1]) >= torch.tensor(self.counts).unsqueeze(1)
        return gather(x, self.order.cpu().masked_fill(padding, -1))

    def unpack(self, x: Tensor) -> Tensor:
        """Undo ``pack`` and set padding to zero."""
        back = gather(x, torch.argsort(self.order, dim=1).cpu())
        return back.masked_fill(~self.mask.view(self.mask.shape + (1,) * (x.dim() - 2)), 0)


@dataclass(frozen=True)
class Prefixed:
    """A call's rows with a prefix of P tokens before every stream that begins in it.

    Attributes:
        rows: the longer rows, as the layer that sees the prefix counts them.
        width: P.
        source: for every column of the longer rows its place in [x ‖ prefix], [B, columns]; None: ``plain`` says all.
        place: for every column of the call its column in the longer rows, [B, T]; None likewise.
        plain: how many rows begin, "all" in their first column, or "none"; "some": see ``source``.
    """

    rows: Rows
    width: int
    plain: str
    source: Tensor | None = None
    place: Tensor | None = None

    def join(self, x: Tensor, prefix: Tensor) -> Tensor:
        """x [B, T, ...] and prefix [P, ...] -> [B, columns, ...]."""
        if self.plain == "none":
            return x
        prefix = prefix.expand(x.shape[0], *prefix.shape)
        if self.source is None:
            return torch.cat((prefix, x), 1)
        return gather(torch.cat((x, prefix), 1), self.source)

    def cut(self, y: Tensor) -> Tensor:
        """The outputs at x, [B, T, ...], of those at every column."""
        if self.plain == "none":
            return y
        return y[:, self.width :] if self.place is None else gather(y, self.place)

    def prefix(self, y: Tensor) -> Tensor | None:
        """The outputs at the prefix of the first stream that begins, [1, P, ...]; None where none does."""
        if self.plain == "none":
            return None
        if self.source is None:
            return y[:1, : self.width]
        tokens = self.source.shape[1] if self.place is None else self.place.shape[1]
        row, column = (self.source == tokens).nonzero()[0].tolist()  # the prefix's first token
        return y[row : row + 1, column : column + self.width]


def prefixed(rows: Rows, width: int) -> Prefixed:
    """The rows with ``width`` more tokens before every stream that begins."""
    seen = tuple(s + width if s else 0 for s in rows.seen)
    if not any(rows.begins):
        return Prefixed(Rows(seen, rows.counts, rows.tokens), width, "none")
    if rows.full and not any(rows.seen):
        return Prefixed(Rows(seen, tuple(n + width for n in rows.counts), rows.tokens + width), width, "all")
    prefix = list(range(rows.tokens, rows.tokens + width))
    lists, starts, place = [], [], torch.zeros(len(seen), rows.tokens, dtype=torch.int64)
    for row in range(len(seen)):
        mine: list[int] = []
        begun: list[int] = []
        for number, document in enumerate(rows.documents(row)):
            if number:
                begun.append(len(mine))
            if not document.seen and document.count:
                mine += prefix
            columns = range(document.start, document.start + document.count)
            place[row, document.start : document.start + document.count] = torch.arange(document.count) + len(mine)
            mine += columns
        lists.append(mine)
        starts.append(tuple(begun))
    total = max(map(len, lists))
    source = torch.tensor([mine + [-1] * (total - len(mine)) for mine in lists], dtype=torch.int64)
    longer = Rows(seen, tuple(map(len, lists)), total, tuple(starts) if any(starts) else ())
    return Prefixed(longer, width, "some", source, place)
