"""Rows on a grid of cells: every row's tokens gathered once, so that one loop over blocks serves them all.

A cell is a memory chunk, or MAC's segment; every stream counts its cells from its own start. Legend as in rows.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from titans.ops.rows import Document, Rows, columns, flags, gather, valid


@dataclass(frozen=True)
class Block:
    """Tokens of one cell in every row, side by side.

    Attributes:
        width: columns.
        counts: real tokens of each row, in the block's first columns.
        seen: tokens that each row's stream had read before the block.
        closing: rows whose cell is complete at the block's end.
        ending: rows whose last tokens these are, and whose cell stays open.
        fresh: rows in which a further document begins with the block.
        first: the block may find its cells begun by an earlier call.
    """

    width: int
    counts: tuple[int, ...]
    seen: tuple[int, ...]
    closing: tuple[bool, ...]
    ending: tuple[bool, ...]
    fresh: tuple[bool, ...]
    first: bool = False

    @cached_property
    def full(self) -> bool:
        """Every row has a token in every column."""
        return all(n == self.width for n in self.counts)

    @cached_property
    def closes(self) -> bool:
        """Every row's cell is complete at the block's end, in its last column."""
        return all(self.closing) and self.full

    @property
    def rows(self) -> Rows:
        """The block as a call of its own, its further documents begun."""
        return Rows(self.seen, self.counts, self.width)


@dataclass(frozen=True)
class Grid:
    """Blocks, one after the other, and where their columns come from; a uniform batch is only cut.

    Attributes:
        blocks: at most the first one finds cells that an earlier call began.
        source: for every grid column of every row its column in the call, -1 where it is empty, [B, columns]; None: the
            grid's columns are the call's.
        place: for every column of the call its grid column, 0 for padding, [B, T]; None likewise.
    """

    blocks: tuple[Block, ...]
    source: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows, size: int) -> Grid:
        """A call's tokens on the grid of cells of ``size`` tokens, counted from every stream's start."""
        phases = [s % size for s in rows.seen]
        if rows.full and len(set(phases)) == 1:
            return _uniform_grid(rows.seen, rows.tokens, size)
        return _ragged_grid([rows.documents(row) for row in range(len(phases))], phases, rows.tokens, size)

    @property
    def widths(self) -> list[int]:
        return [block.width for block in self.blocks]

    def lay(self, x: Tensor) -> Tensor:
        """[G, T, ...] -> [G, columns, ...], rows in groups of G / B; empty columns hold some real token's values."""
        return x if self.source is None else gather(x, self.source)

    def gather(self, x: Tensor) -> Tensor:
        """Undo ``lay``: [G, columns, ...] -> [G, T, ...]; what padding receives is undefined."""
        return x if self.place is None else gather(x, self.place)

    def real(self, device: torch.device, groups: int = 1) -> Tensor | None:
        """[G, columns] bool: columns that hold a token; None where all do."""
        return None if self.source is None else (self.source >= 0).to(device).repeat_interleave(groups, 0)


def _uniform_grid(seen: tuple[int, ...], tokens: int, size: int) -> Grid:
    phase = seen[0] % size
    head = min(tokens, size - phase) if phase else 0
    full, rest = divmod(tokens - head, size)
    widths = [*([head] if head else []), *[size] * full, *([rest] if rest else [])]
    blocks, done, no = [], 0, (False,) * len(seen)
    for width in widths:
        closes = (phase + done + width) % size == 0
        fields = ((width,) * len(seen), tuple(n + done for n in seen), (closes,) * len(seen), (not closes,) * len(seen))
        blocks.append(Block(width, *fields, no, first=bool(phase) and not done))
        done += width
    return Grid(tuple(blocks))


def _ragged_grid(documents: list[list[Document]], phases: list[int], tokens: int, size: int) -> Grid:
    """The first block completes what earlier calls began; from there on every row and document starts its own cells."""
    first = [d[0].count for d in documents]
    heads = [min(size - p, n) if p else 0 for p, n in zip(phases, first, strict=True)]
    begun = any(p for p in phases)
    if begun:  # rows at a cell's start that end within the first block may as well come along
        heads = [n if not p and n <= max(heads) else h for p, n, h in zip(phases, first, heads, strict=True)]
    pieces = [[_piece(d[0], 0, h, size)] if begun else [] for d, h in zip(documents, heads, strict=True)]
    for mine, row, head in zip(pieces, documents, heads, strict=True):
        for i, document in enumerate(row):
            taken = range(head if i == 0 else 0, document.count, size)
            mine += [
                _piece(document, at, min(size, document.count - at), size, fresh=i > 0 and at == 0) for at in taken
            ]
    for mine in pieces:
        if mine and not mine[-1].closing:
            mine[-1] = replace(mine[-1], ending=True)
    return _assemble(pieces, [row[-1] for row in documents], tokens, begun)


@dataclass(frozen=True)
class _Piece:
    """One row's share of a block: its first column and number of tokens in the call, and what happens to its cell."""

    start: int
    count: int
    seen: int
    closing: bool
    fresh: bool = False
    ending: bool = False


def _piece(document: Document, at: int, count: int, size: int, fresh: bool = False) -> _Piece:
    seen = document.seen + at
    return _Piece(document.start + at, count, seen, count > 0 and (seen + count) % size == 0, fresh)


def _assemble(pieces: list[list[_Piece]], last: list[Document], tokens: int, begun: bool) -> Grid:
    blocks, source, place, offset = [], [], torch.zeros(len(pieces), tokens, dtype=torch.int64), 0
    for number in range(max(map(len, pieces))):
        idle = (_Piece(0, 0, d.seen + d.count, False) for d in last)
        turn = [mine[number] if number < len(mine) else rest for mine, rest in zip(pieces, idle, strict=True)]
        width = max(p.count for p in turn)
        fields = ((getattr(p, n) for p in turn) for n in ("count", "seen", "closing", "ending", "fresh"))
        counts, seen, closing, ending, fresh = map(tuple, fields)
        blocks.append(Block(width, counts, seen, closing, ending, fresh, first=begun and number == 0))
        starts = torch.tensor([p.start for p in turn]).unsqueeze(1)
        real = valid(counts, width, starts.device)
        source.append((starts + torch.arange(width)).masked_fill(~real, -1))
        for row, p in enumerate(turn):
            place[row, p.start : p.start + p.count] = torch.arange(offset, offset + p.count)
        offset += width
    empty = torch.zeros(len(pieces), 0, dtype=torch.int64)
    return Grid(tuple(blocks), torch.cat(source, 1) if source else empty, place)


@dataclass(frozen=True)
class Remainder:
    """What an open cell leaves behind, by block: tensors [G, columns, ...] whose row b ends before column ends[b]."""

    rows: tuple[bool, ...]
    ends: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def remainders(found: Iterable[Remainder], width: int, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The last ``width`` columns of every row's remainder, right-aligned; zeros for rows without one."""
    out = [x.new_zeros(x.shape[0], width, *x.shape[2:]) for x in like]
    for piece in found:
        groups = like[0].shape[0] // len(piece.rows)
        starts = [end - width for end in piece.ends for _ in range(groups)]
        cut = (columns(x, starts, width) for x in piece.tensors)
        if all(piece.rows):
            out = list(cut)
        else:
            out = [torch.where(flags(piece.rows, x), x, old) for x, old in zip(cut, out, strict=True)]
    return tuple(out)
