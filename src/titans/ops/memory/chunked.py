"""The general engine: the dual form of math.md §3, one loop over chunks, never a stack of per-token weights.

Legend: G rows (batch times heads), T tokens, C chunk, D head width. All tensors here are [G, T, D] or [G, T]; the
weights of a map are [G, out, in] or [G, width].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from titans.ops.grid import Block, Grid, Remainder, remainders
from titans.ops.memory.channel import ChannelDecays
from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.decay import Decay, Decays
from titans.ops.memory.maps import map_kind, retain, where_rows
from titans.ops.memory.rule import Maps, RowRule
from titans.ops.memory.state import MemoryState, OpenChunk
from titans.ops.memory.tokens import Gates, Tokens
from titans.ops.rows import Rows, columns, flags
from titans.state import counts

RunChunks = Callable[..., tuple[Tensor, Maps, Maps]]
"""As `titans.ops.memory.fused.run_chunks`."""


@dataclass(frozen=True)
class Trace:
    """Per token, [G, T]: the norm of the gradient and the inner loss, both at the chunk's start; the inner loss at the
    chunk's end, NaN while it is open."""

    surprise: Tensor
    loss: Tensor
    after: Tensor


@dataclass(frozen=True)
class Scanned:
    """What an engine returns: y [G, T, D], the state after every row's last token, and the trace if asked for."""

    y: Tensor
    state: MemoryState
    trace: Trace | None = None


def chunked_scan(
    rule: RowRule,
    tokens: Tokens,
    state: MemoryState,
    rows: Rows,
    *,
    compiled: bool = False,
    run: RunChunks | None = None,
    traced: bool = False,
) -> Scanned:
    """Read and write the rows' tokens from ``state`` on, each right after its own write.

    Args:
        rule, tokens, state: in the engines' layout.
        rows: of the samples; each stands for G / B rows here.
        compiled: runs whole chunks through ``torch.compile``: minutes of warm-up once per shape, then faster.
        run: does runs of whole chunks, all rows in step; the rule must be one that it knows.
        traced: also return a `Trace`.
    """
    groups = tokens.q.shape[0] // len(rows.seen)
    grid = Grid.of(rows, state.chunk_size)
    laid = tokens.each(grid.lay)
    real = grid.real(tokens.q.device, groups)
    if real is not None:
        laid = replace(laid, gates=laid.gates.where(real))
    state = state.begun([n for n in rows.seen for _ in range(groups)])
    walk = _Walk(rule, state, groups, compiled, traced)
    spans = _spans(grid.blocks, run is not None and not traced)
    widths = [sum(block.width for block in blocks) for _, blocks in spans]
    for (in_step, blocks), tokens in zip(spans, laid.split(widths), strict=True):
        if in_step and run is not None:
            walk.run(run, tokens)
            continue
        parts = tokens.split([block.width for block in blocks])
        if blocks[0].first and state.chunk.width:  # gates are of all the chunk's tokens so far
            parts[0] = replace(parts[0], gates=state.chunk.gates.then(parts[0].gates))
        for block, part, decays in zip(blocks, parts, _decays(blocks, parts), strict=True):
            walk.take(block, part, decays)
    y = grid.gather(walk.outputs(laid.q))
    trace = Trace(*(grid.gather(torch.cat(pieces, 1)) for pieces in walk.traces)) if traced else None
    return Scanned(y, walk.state(rows, laid.gates), trace)


def read_open(rule: RowRule, q: Tensor, state: MemoryState) -> Tensor:
    """Read q [G, n, D] at the weights that the last token left behind."""
    used, chunk = rule.use(state.weights), state.begun(state.count).chunk
    if not chunk.width:
        return rule.value(q, rule.applied(used))
    decays, now = decays_of(chunk.gates), []
    for i, weight in enumerate(used):
        ending, view = decays.of_map(i).ending(), rule.view(i, state.weights)
        base = retain(ending.retained, weight) if view.fades else weight
        if view.writes:
            momentum = view.shown(state.momentum[i]) if state.momentum else None
            base = ending.weight(base, momentum, chunk.inputs[i], view.shown(chunk.errors[i]))
        now.append(base)
    return rule.value(q, rule.applied(tuple(now)))


class _Walk:
    """The loop's carried values: (A, S, W), the chunks that earlier calls left open, and the outputs so far."""

    def __init__(self, rule: RowRule, state: MemoryState, groups: int, compiled: bool, traced: bool):
        self.whole_chunk = _compiled_chunk() if compiled and not torch.compiler.is_compiling() else whole_chunk
        self.rule, self.start, self.groups, self.traced = rule, state, groups, traced
        self.weights, self.used, self.momentum = state.weights, rule.use(state.weights), state.momentum
        self.open: list[tuple[Remainder, Gates]] = []
        self.pieces: list[Tensor] = []
        self.traces: tuple[list[Tensor], ...] = ([], [], [])

    def outputs(self, like: Tensor) -> Tensor:
        if not self.pieces:
            return like
        return torch.cat(self.pieces, 1) if len(self.pieces) != 1 else self.pieces[0]

    def take(self, block: Block, tokens: Tokens, decays: Decays) -> None:
        """Read and write one block."""
        if any(block.fresh):
            self._begin(flags(block.fresh, tokens.q[:, 0, 0]))
        if block.closes and not block.first and not self.traced:
            y, self.weights, self.momentum, self.used = self.whole_chunk(
                self.rule, self.weights, self.momentum, self.used, tokens, decays
            )
        else:
            y = self._step(block, tokens, decays)
        self.pieces.append(y)

    def run(self, run: RunChunks, tokens: Tokens) -> None:
        """Read and write whole chunks in one go."""
        rule = self.rule
        known = ChunkRule.of(rule.miras, self.start.chunk_size, rule.initial, rule.gain, rule.bias)
        y, self.weights, self.momentum = run(known, tokens, self.weights, self.momentum)
        self.used = rule.use(self.weights)
        self.pieces.append(y)

    def _begin(self, fresh: Tensor) -> None:
        """These rows [G] start from A_0 and S = 0."""
        self.weights = where_rows(fresh, self.rule.initial, self.weights)
        self.used = where_rows(fresh, self.rule.use(self.rule.initial), self.used)
        self.momentum = where_rows(fresh, tuple(map(torch.zeros_like, self.momentum)), self.momentum)

    def _step(self, block: Block, tokens: Tokens, decays: Decays) -> Tensor:
        """A block that completes a begun chunk, leaves one open, or in which rows differ."""
        rule, gates, stored = self.rule, tokens.gates, 0
        if not block.width:  # rows inside a chunk have no token here, and the others are at a chunk's start
            chunk = self.start.chunk
            tensors = (*chunk.inputs, *chunk.errors, *_listed(chunk.gates.storable()))
            self.open.append((Remainder(block.ending, (chunk.width,) * len(block.ending), tensors), chunk.gates))
            return tokens.q
        inputs, errors, residual = rule.gradient_factors(self.used, tokens.k, tokens.v, tokens.delta)
        if self.traced:
            self._trace(inputs, errors, residual, tokens.delta)
        if block.first:
            chunk, stored = self.start.chunk, self.start.chunk.width
            inputs, errors = (
                tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True))
                for old, new in ((chunk.inputs, inputs), (chunk.errors, errors))
            )
        y = read_chunk(rule, self.weights, self.used, self.momentum, tokens.q, inputs, errors, decays.last(block.width))
        if any(block.closing):
            folded = fold(rule, self.weights, self.momentum, inputs, errors, decays)
            y = self._close(block, folded, tokens, y)
        if any(block.ending):
            ends = tuple(stored + n for n in block.counts)
            tensors = (*inputs, *errors, *_listed(gates.storable()))
            self.open.append((Remainder(block.ending, ends, tensors), gates))
        return y

    def _close(self, block: Block, folded: tuple[Maps, Maps, Maps], tokens: Tokens, y: Tensor) -> Tensor:
        """Carry the end of the chunk on for the rows that reach it; their last token reads φ(A_C)."""
        weights, momentum, used = folded
        if block.closes:
            self.weights, self.momentum, self.used = folded
            y = finish(self.rule, used, tokens.q, y)
        else:
            rows = flags(block.closing, y[:, 0, 0])
            if not self.rule.expansion_is_exact:
                last = [max(n - 1, 0) for n in block.counts for _ in range(self.groups)]
                read = self.rule.value(columns(tokens.q, last, 1), self.rule.applied(used))
                at = torch.tensor(last, device=y.device).unsqueeze(1) == torch.arange(block.width, device=y.device)
                y = torch.where((rows.unsqueeze(1) & at).unsqueeze(-1), read, y)
            self.weights = where_rows(rows, weights, self.weights)
            self.momentum = where_rows(rows, momentum, self.momentum)
            self.used = where_rows(rows, used, self.used)
        if self.traced:
            residual = self.rule.value(tokens.k, self.rule.applied(used)) - tokens.v
            after, old = self.rule.miras.bias.loss(residual, tokens.delta), self.traces[2][-1]
            self.traces[2][-1] = torch.where(flags(block.closing, old), after, old)
        return y

    def _trace(self, inputs: Maps, errors: Maps, residual: Tensor, delta: Tensor | None) -> None:
        norms = [map_kind(w).surprise(a, e) for w, a, e in zip(self.used, inputs, errors, strict=True)]
        loss = self.rule.miras.bias.loss(residual, delta)
        surprise = torch.stack(norms).sum(0).sqrt()
        for pieces, new in zip(self.traces, (surprise, loss, torch.full_like(loss, torch.nan)), strict=True):
            pieces.append(new)

    def state(self, rows: Rows, gates: Gates) -> MemoryState:
        """Where the rows stand after their last tokens."""
        size, maps = self.start.chunk_size, len(self.weights)
        phases = [n % size for n in rows.after for _ in range(self.groups)]
        if self.open:
            found = remainders((r for r, _ in self.open), max(phases), self.open[0][0].tensors)
            kept = _unlisted(found[2 * maps :], self.open[0][1].storable())
            chunk = OpenChunk(found[:maps], found[maps : 2 * maps], kept).only(phases, max(phases))
        else:  # all rows stand at a chunk's start, or none had a token
            chunk = self.start.chunk if not self.pieces and max(phases) else self._empty(gates)
        read = counts([n for n in rows.after for _ in range(self.groups)])
        return MemoryState(self.weights, self.momentum, chunk, read, size)

    def _empty(self, gates: Gates) -> OpenChunk:
        """A chunk without tokens."""
        return empty_chunk(self.weights, gates.each(lambda g: g[:, :0]).storable())


def empty_chunk(weights: Maps, gates: Gates) -> OpenChunk:
    """A chunk without tokens, in the engines' layout; ``gates`` have no columns."""
    inputs = tuple(w.new_zeros(w.shape[0], 0, w.shape[-1]) for w in weights)
    return OpenChunk(inputs, tuple(w.new_zeros(w.shape[0], 0, w.shape[1]) for w in weights), gates)


def _listed(gates: Gates) -> list[Tensor]:
    found: list[Tensor] = []
    gates.each(lambda g: found.append(g) or g)
    return found


def _unlisted(tensors: Sequence[Tensor], like: Gates) -> Gates:
    rest = iter(tensors)
    return like.each(lambda _: next(rest))


def whole_chunk(
    rule: RowRule, weights: Maps, momentum: Maps, used: Maps, tokens: Tokens, decays: Decays
) -> tuple[Tensor, Maps, Maps, Maps]:
    """One chunk from start to end, all rows in step: the hot path, and the unit that ``torch.compile`` sees.

    Returns:
        y [G, C, D] and (A, S, W) at the chunk's end.
    """
    inputs, errors, _ = rule.gradient_factors(used, tokens.k, tokens.v, tokens.delta)
    y = read_chunk(rule, weights, used, momentum, tokens.q, inputs, errors, decays)
    weights, momentum, used = fold(rule, weights, momentum, inputs, errors, decays)
    return finish(rule, used, tokens.q, y), weights, momentum, used


def read_chunk(
    rule: RowRule, weights: Maps, used: Maps, momentum: Maps, q: Tensor, inputs: Maps, errors: Maps, decays: Decays
) -> Tensor:
    """Every query at its own token's weights, as far as the rule shows them inside a chunk."""

    def read(i: int, x: Tensor) -> Tensor:
        decay, view = decays.of_map(i), rule.view(i, weights)
        if view.writes:
            past = view.shown(momentum[i]) if momentum else None
            return decay.read(x, used[i], past, inputs[i], view.shown(errors[i]), view.fades)
        out = map_kind(used[i]).apply(used[i], x)
        return decay.retained * out if view.fades and decay.retained is not None else out

    return rule.value(q, read)


def finish(rule: RowRule, used: Maps, q: Tensor, y: Tensor) -> Tensor:
    """A chunk's last token reads the weights that the next chunk starts from.

    Two tokens are read and one is kept: Inductor writes products with a single row as loops over the weights, with the
    activation worked out again for each of them. With two they are matrix products (docs/results/core.md).
    """
    if rule.expansion_is_exact:
        return y
    return torch.cat((y[:, :-1], rule.value(q[:, -2:], rule.applied(used))[:, -1:]), 1)


def fold(
    rule: RowRule, weights: Maps, momentum: Maps, inputs: Maps, errors: Maps, decays: Decays
) -> tuple[Maps, Maps, Maps]:
    """(A, S, W) at the chunk's end."""
    new_weights, new_momentum = [], []
    for i, (weight, a, error) in enumerate(zip(weights, inputs, errors, strict=True)):
        ending = decays.of_map(i).ending()
        past = momentum[i] if momentum and ending.carried is not None else None
        if past is not None:
            new_momentum.append(ending.momentum(past, a, error))
        base = rule.retain(i, ending, weight)
        if rule.miras.algorithm.per_chunk:
            new_weights.append(rule.write_at_once(base, new_momentum[i], ending.steps, i))
        else:
            new_weights.append(ending.weight(base, past, a, error))
    closed, used = rule.close(tuple(new_weights))
    return closed, tuple(new_momentum), used


@cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Maps, Maps, Maps]]:
    return torch.compile(whole_chunk, dynamic=False)


def decays_of(gates: Gates) -> Decays:
    """Of the gates of one chunk's tokens so far."""
    channel = isinstance(gates.theta, tuple) or isinstance(gates.alpha, tuple)
    return ChannelDecays.of(gates) if channel else Decay.of(gates)


def _decays(blocks: Sequence[Block], parts: Sequence[Tokens]) -> list[Decays]:
    """Of every block: of equally wide ones at once, where one number per token serves every channel."""
    found: list[Decays] = []
    kinds = groupby(zip(blocks, parts, strict=True), key=lambda pair: (pair[0].first, pair[0].width))
    for _, pairs in kinds:
        gates = [part.gates for _, part in pairs]
        if isinstance(gates[0].theta, tuple):
            found += [ChannelDecays.of(g) for g in gates]
        elif len(gates) == 1:
            found.append(decays_of(gates[0]))
        else:
            found += Decay.of(_stack(gates)).unbind()
    return found


def _spans(blocks: Sequence[Block], runs: bool) -> list[tuple[bool, list[Block]]]:
    """Blocks in order, those that a run of whole chunks can do side by side; True says which."""

    def in_step(block: Block) -> bool:
        return runs and block.closes and not block.first and not any(block.fresh)

    return [(key, list(found)) for key, found in groupby(blocks, key=in_step)]


def _stack(gates: Sequence[Gates]) -> Gates:
    """[G, n, C] of n chunks' gates [G, C]."""
    listed = zip(*map(_listed, gates), strict=True)
    return _unlisted([torch.stack(g, 1) for g in listed], gates[0])
