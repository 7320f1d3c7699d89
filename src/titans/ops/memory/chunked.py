"""The fast engine: the dual form of math.md §3, one loop over chunks, never a stack of per-token weights.

Legend: G rows (batch times heads), T tokens, C chunk, D head width, p tokens already in the open chunk. All tensors
here are [G, T, D] or [G, T]; the weights of a map are [G, out, in] or [G, width].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from titans.ops.memory.channel import ChannelDecay, ChannelDecays, channel_decays, channel_read
from titans.ops.memory.decay import Decay, chunk_decay
from titans.ops.memory.rule import Rule, advance_momentum, advance_weight, map_kind, where_rows
from titans.ops.memory.state import Gates, MemoryState, OpenChunk
from titans.ops.ragged import columns, valid

Maps = tuple[Tensor, ...]
Decays = Decay | ChannelDecays


@dataclass(frozen=True)
class Block:
    """New tokens of one chunk: q, k, v [G, m, D], delta [G, m, 1 or D], and the decay over stored and new tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor | None
    decay: Decays


@dataclass(frozen=True)
class Trace:
    """Per token, [G, T]: the norm of the gradient and the inner loss, both at the chunk's start; the inner loss at the
    chunk's end, NaN while it is open."""

    surprise: Tensor
    loss: Tensor
    after: Tensor


def chunked_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    gates: Gates,
    state: MemoryState,
    lengths: Sequence[int] | None = None,
    traces: list[Trace] | None = None,
    compiled: bool = False,
) -> tuple[Tensor, MemoryState]:
    """Read and write T tokens from ``state`` on; rows are right-padded to ``lengths``.

    ``compiled`` runs whole chunks through ``torch.compile``: minutes of warm-up once per shape, then faster.

    Returns:
        y [G, T, D] and the state after the last token. ``traces`` receives one entry per block.
    """
    if lengths is None and len(set(state.phases)) == 1:
        return _uniform_scan(rule, q, k, v, delta, gates, state, traces, compiled)
    return _ragged_scan(rule, q, k, v, delta, gates, state, lengths or (q.shape[1],) * q.shape[0], traces)


def _uniform_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    gates: Gates,
    state: MemoryState,
    traces: list[Trace] | None,
    compiled: bool,
) -> tuple[Tensor, MemoryState]:
    """Every row stands at the same place of its chunk: plain slices."""
    size, phase, tokens = state.chunk_size, state.phases[0], q.shape[1]
    first = min(tokens, size - phase) if phase else 0
    full = (tokens - first) // size
    stop = first + full * size
    walk = _Walk(rule, state, traces, compiled)

    def block(start: int, stop: int, joined: Gates) -> Block:
        parts = (None if x is None else x[:, start:stop] for x in (q, k, v, delta))
        return Block(*parts, _decays(joined))  # type: ignore[arg-type]

    if first:
        head = _slice_gates(gates, 0, first)
        joined = head if state.chunk is None else state.chunk.gates.then(head)
        walk.step(block(0, first, joined), joined, phase + first == size)
    if full:
        # One split, not a slice per chunk: autograd would fill a whole tensor with zeros for each of them.
        cut = ([None] * full if x is None else x[:, first:stop].split(size, 1) for x in (q, k, v, delta))
        for parts, decays in zip(zip(*cut, strict=True), _chunk_decays(gates, first, size, full), strict=True):
            walk.whole(Block(*parts, decays))  # type: ignore[arg-type]
    if stop < tokens:
        tail = _slice_gates(gates, stop, tokens)
        walk.step(block(stop, tokens, tail), tail, False)
    return walk.outputs(), walk.state(tuple(n + tokens for n in state.count))


def _ragged_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    gates: Gates,
    state: MemoryState,
    lengths: Sequence[int],
    traces: list[Trace] | None,
) -> tuple[Tensor, MemoryState]:
    """Rows have phases and lengths of their own: each takes as many tokens per step as its chunk still holds."""
    size = state.chunk_size
    state = replace(state, chunk=state.chunk and state.chunk.only(state.phases))
    walk = _Walk(rule, state, traces)
    done, phases = [0] * len(lengths), list(state.phases)
    places: list[tuple[list[int], int]] = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        counts = [min(size - p, n - d) for p, d, n in zip(phases, done, lengths, strict=True)]
        width = max(counts)
        real = valid(counts, width, q.device)
        new = gates.map(partial(columns, start=done, width=width)).where(real)
        joined = new if walk.chunk is None else walk.chunk.gates.then(new)
        closing = [p + c == size for p, c in zip(phases, counts, strict=True)]
        parts = (None if x is None else columns(x, done, width) for x in (q, k, v, delta))
        block = Block(*parts, _decays(joined))  # type: ignore[arg-type]
        walk.ragged_step(block, joined, counts, closing)
        places.append((list(done), width))
        phases = [0 if c else p + n for p, n, c in zip(phases, counts, closing, strict=True)]
        done = [d + n for d, n in zip(done, counts, strict=True)]
        walk.chunk = walk.chunk and walk.chunk.only(phases)
    out = torch.zeros_like(q)
    rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1)
    for i, (start, width) in enumerate(places):
        following = places[i + 1][0] if i + 1 < len(places) else done
        taken = [b - a for a, b in zip(start, following, strict=True)]
        keep = valid(taken, width, q.device)
        index = (torch.tensor(start, device=q.device).unsqueeze(1) + torch.arange(width, device=q.device)).clamp(
            max=q.shape[1] - 1
        )
        out = out.index_put((rows.expand_as(index)[keep], index[keep]), walk.pieces[i][keep])
    return out, walk.state(tuple(c + n for c, n in zip(state.count, lengths, strict=True)))


def read_open(rule: Rule, q: Tensor, state: MemoryState) -> Tensor:
    """Read q [G, n, D] at the weights that the last token left behind."""
    used = rule.use(state.weights)
    chunk = state.chunk and state.chunk.only(state.phases)
    if chunk is None:
        return rule.value(q, rule.applied(used))
    if rule.miras.retention.inside == "hidden":
        return rule.value(q, rule.applied(used))
    decays = _decays(chunk.gates)
    now = []
    for i, weight in enumerate(used):
        ending = decays.of_map(i).ending()
        base = rule.retain_inside(ending, weight)
        if rule.miras.algorithm.per_chunk:
            now.append(base)
        else:
            momentum, error = _shown(rule, i, state.weights, state.momentum, chunk.errors)
            now.append(advance_weight(ending, base, momentum, chunk.inputs[i], error))
    return rule.value(q, rule.applied(tuple(now)))


class _Walk:
    """The loop's carried values: (A, S, W), the open chunk, and the outputs so far."""

    def __init__(self, rule: Rule, state: MemoryState, traces: list[Trace] | None, compiled: bool = False):
        self.whole_chunk = _compiled_chunk() if compiled and not torch.compiler.is_compiling() else whole_chunk
        self.rule = rule
        self.size = state.chunk_size
        self.weights = state.weights
        self.used = rule.use(state.weights)
        self.momentum = state.momentum
        self.chunk = state.chunk
        self.pieces: list[Tensor] = []
        self.traces = traces

    def outputs(self) -> Tensor:
        return torch.cat(self.pieces, 1) if len(self.pieces) != 1 else self.pieces[0]

    def state(self, count: tuple[int, ...]) -> MemoryState:
        return MemoryState(self.weights, self.momentum, self.chunk, count, self.size)

    def whole(self, block: Block) -> None:
        """A whole chunk at once, all rows in step."""
        if self.traces is not None:
            self.step(block, None, True)
            return
        y, self.weights, self.momentum, self.used = self.whole_chunk(
            self.rule, self.weights, self.momentum, self.used, block
        )
        self.pieces.append(y)

    def step(self, block: Block, gates: Gates | None, closes: bool) -> None:
        """One block, all rows in step; ``gates`` are those of the chunk's tokens so far, for the state."""
        y, inputs, errors = self._read(block)
        if closes:
            self.weights, self.momentum, self.used = fold(
                self.rule, self.weights, self.momentum, inputs, errors, block.decay
            )
            y, self.chunk = finish(self.rule, self.used, block.q, y), None
            if self.traces:
                residual = self.rule.value(block.k, self.rule.applied(self.used)) - block.v
                after = self.rule.miras.bias.loss(residual, block.delta)
                self.traces[-1] = replace(self.traces[-1], after=after)
        elif gates is not None:
            self.chunk = OpenChunk(inputs, errors, gates)
        self.pieces.append(y)

    def ragged_step(self, block: Block, gates: Gates, counts: Sequence[int], closing: Sequence[bool]) -> None:
        """One block in which only some rows reach their chunk's end."""
        y, inputs, errors = self._read(block)
        stored = inputs[0].shape[1] - block.q.shape[1]
        if any(closing):
            weights, momentum, used = fold(self.rule, self.weights, self.momentum, inputs, errors, block.decay)
            rows = torch.tensor(closing, device=y.device)
            if not self.rule.expansion_is_exact:
                last = [n - 1 for n in counts]
                read = self.rule.value(columns(block.q, last, 1), self.rule.applied(used))
                final = rows.unsqueeze(1) & (
                    torch.arange(y.shape[1], device=y.device) == torch.tensor(last, device=y.device).unsqueeze(1)
                )
                y = torch.where(final.unsqueeze(-1), read, y)
            self.weights = where_rows(rows, weights, self.weights)
            self.momentum = where_rows(rows, momentum, self.momentum)
            self.used = where_rows(rows, used, self.used)
        ends = [stored + n for n in counts]
        width = max((e for e, c in zip(ends, closing, strict=True) if not c), default=0)
        width = min(width, self.size - 1)
        self.chunk = None
        if width:
            starts = [e - width for e in ends]
            self.chunk = OpenChunk(
                tuple(columns(x, starts, width) for x in inputs),
                tuple(columns(x, starts, width) for x in errors),
                gates.map(lambda g: columns(g, starts, width)),
            )
        self.pieces.append(y)

    def _read(self, block: Block) -> tuple[Tensor, Maps, Maps]:
        """Outputs of the block's queries, and a_i, δ_i of all the chunk's tokens so far."""
        inputs, errors, residual = self.rule.gradient_factors(self.used, block.k, block.v, block.delta)
        if self.traces is not None:
            norms = (map_kind(w).surprise(a, e) for w, a, e in zip(self.used, inputs, errors, strict=True))
            loss = self.rule.miras.bias.loss(residual, block.delta)
            surprise = sum(norms, start=torch.zeros((), device=loss.device)).sqrt()
            self.traces.append(Trace(surprise, loss, torch.full_like(loss, torch.nan)))
        if self.chunk is not None:
            inputs = tuple(torch.cat(pair, 1) for pair in zip(self.chunk.inputs, inputs, strict=True))
            errors = tuple(torch.cat(pair, 1) for pair in zip(self.chunk.errors, errors, strict=True))
        decay = block.decay.last(block.q.shape[1])
        y = read_chunk(self.rule, self.weights, self.used, self.momentum, block.q, inputs, errors, decay)
        return y, inputs, errors


def whole_chunk(rule: Rule, weights: Maps, momentum: Maps, used: Maps, block: Block) -> tuple[Tensor, Maps, Maps, Maps]:
    """One chunk from start to end, all rows in step: the hot path, and the unit that ``torch.compile`` sees.

    Returns:
        y [G, C, D] and (A, S, W) at the chunk's end.
    """
    inputs, errors, _ = rule.gradient_factors(used, block.k, block.v, block.delta)
    y = read_chunk(rule, weights, used, momentum, block.q, inputs, errors, block.decay)
    weights, momentum, used = fold(rule, weights, momentum, inputs, errors, block.decay)
    return finish(rule, used, block.q, y), weights, momentum, used


def read_chunk(
    rule: Rule, weights: Maps, used: Maps, momentum: Maps, q: Tensor, inputs: Maps, errors: Maps, decay: Decays
) -> Tensor:
    """Every query at its own token's weights, as far as the retention and the algorithm show them inside a chunk."""
    if rule.miras.retention.inside == "hidden":
        return rule.value(q, rule.applied(used))

    def read(i: int, x: Tensor) -> Tensor:
        mine, pulls = decay.of_map(i), rule.miras.retention.pulls
        if rule.miras.algorithm.per_chunk:
            out = map_kind(used[i]).apply(used[i], x)
            return out if mine.retained is None or pulls else mine.retained * out
        pushed, error = _shown(rule, i, weights, momentum, errors)
        if not isinstance(mine, ChannelDecay):
            mine = replace(mine, retained=None) if pulls else mine
            return map_kind(used[i]).read(x, used[i], pushed, inputs[i], error, mine)
        if not pulls:
            return channel_read(x, used[i], pushed, inputs[i], error, mine)
        writes = channel_read(x, torch.zeros_like(used[i]), pushed, inputs[i], error, mine)
        return map_kind(used[i]).apply(used[i], x) + writes

    return rule.value(q, read)


def _shown(rule: Rule, i: int, weights: Maps, momentum: Maps, errors: Maps) -> tuple[Tensor | None, Tensor]:
    """S and the errors of map i on the scale on which a read inside the chunk sees them."""
    past = momentum[i] if momentum else None
    if rule.miras.retention.inside != "scaled":
        return past, errors[i]
    assert rule.anchors is not None
    factor = rule.miras.retention.factor(weights[i], rule.anchors[i])
    return None if past is None else past * factor, errors[i] * factor.view(-1, 1, 1)


def finish(rule: Rule, used: Maps, q: Tensor, y: Tensor) -> Tensor:
    """A chunk's last token reads the weights that the next chunk starts from.

    Two tokens are read and one is kept: Inductor writes products with a single row as loops over the weights, with the
    activation worked out again for each of them. With two they are matrix products (docs/results/core.md).
    """
    if rule.expansion_is_exact:
        return y
    return torch.cat((y[:, :-1], rule.value(q[:, -2:], rule.applied(used))[:, -1:]), 1)


def fold(
    rule: Rule, weights: Maps, momentum: Maps, inputs: Maps, errors: Maps, decay: Decays
) -> tuple[Maps, Maps, Maps]:
    """(A, S, W) at the chunk's end."""
    new_weights, new_momentum = [], []
    for i, (weight, a, error) in enumerate(zip(weights, inputs, errors, strict=True)):
        ending = decay.of_map(i).ending()
        past = momentum[i] if momentum and ending.carried is not None else None
        if past is not None:
            new_momentum.append(advance_momentum(ending, past, a, error))
        base = rule.retain(i, ending, weight)
        if rule.miras.algorithm.per_chunk:
            new_weights.append(rule.write_at_once(base, new_momentum[i], ending.steps, i))
        else:
            new_weights.append(advance_weight(ending, base, past, a, error))
    closed, used = rule.close(tuple(new_weights))
    return closed, tuple(new_momentum), used


@cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Maps, Maps, Maps]]:
    return torch.compile(whole_chunk, dynamic=False)


def _decays(gates: Gates) -> Decays:
    """Of the gates of one chunk's tokens so far."""
    if isinstance(gates.theta, tuple) or isinstance(gates.alpha, tuple):
        return channel_decays(gates)
    return chunk_decay(gates.theta, gates.eta, gates.alpha, gates.write)


def _chunk_decays(gates: Gates, start: int, size: int, chunks: int) -> Iterable[Decays]:
    """Of whole chunks from ``start`` on: all at once where one number per token serves every channel."""
    if isinstance(gates.theta, tuple):
        starts = range(start, start + chunks * size, size)
        return (channel_decays(_slice_gates(gates, at, at + size)) for at in starts)
    folded = _slice_gates(gates, start, start + chunks * size).map(lambda g: g.unflatten(1, (chunks, size)))
    decay = _decays(folded)
    assert isinstance(decay, Decay)
    fields = (getattr(decay, f.name) for f in dataclasses.fields(decay))
    parts = [(None,) * chunks if f is None else f.unbind(1) for f in fields]
    return [Decay(*part) for part in zip(*parts, strict=True)]  # type: ignore[arg-type]


def _slice_gates(gates: Gates, start: int, stop: int) -> Gates:
    return gates.map(lambda g: g[:, start:stop])
