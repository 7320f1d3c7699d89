"""The fast engine: the dual form of math.md §3, one loop over chunks, never a stack of per-token weights.

Legend: G rows (batch times heads), T tokens, C chunk, D head width, p tokens already in the open chunk. All tensors
here are [G, T, D] or [G, T]; the weights of a map are [G, out, in] or [G, width].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from titans.ops.memory.decay import Decay, chunk_decay
from titans.ops.memory.rule import Rule, map_kind, where_rows
from titans.ops.memory.state import Gates, MemoryState, OpenChunk
from titans.ops.ragged import columns, valid

Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class Block:
    """New tokens of one chunk: q, k, v [G, m, D] and the decay factors over stored and new tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Decay


@dataclass(frozen=True)
class Trace:
    """Per token, [G, T]: the norm of the gradient and the inner loss, both at the chunk's start."""

    surprise: Tensor
    loss: Tensor


def chunked_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        return _uniform_scan(rule, q, k, v, gates, state, traces, compiled)
    return _ragged_scan(rule, q, k, v, gates, state, lengths or (q.shape[1],) * q.shape[0], traces)


def _uniform_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: MemoryState,
    traces: list[Trace] | None,
    compiled: bool,
) -> tuple[Tensor, MemoryState]:
    """Every row stands at the same place of its chunk: plain slices."""
    size, phase, tokens = state.chunk_size, state.phases[0], q.shape[1]
    first = min(tokens, size - phase) if phase else 0
    full = (tokens - first) // size
    walk = _Walk(rule, state, traces, compiled)
    if first:
        head = _slice_gates(gates, 0, first)
        joined = head if state.chunk is None else state.chunk.gates.then(head)
        walk.step(Block(q[:, :first], k[:, :first], v[:, :first], _decay(joined)), joined, phase + first == size)
    if full:
        stop = first + full * size
        decays = _unbind(_decay(_fold_gates(_slice_gates(gates, first, stop), full)), full)
        chunks = [x[:, first:stop].unflatten(1, (full, size)).unbind(1) for x in (q, k, v)]
        for q_c, k_c, v_c, decay in zip(*chunks, decays, strict=True):
            if traces is None:
                walk.whole(q_c, k_c, v_c, decay)
            else:
                walk.step(Block(q_c, k_c, v_c, decay), None, True)
    if (start := first + full * size) < tokens:
        tail = _slice_gates(gates, start, tokens)
        walk.step(Block(q[:, start:], k[:, start:], v[:, start:], _decay(tail)), tail, False)
    return walk.outputs(), walk.state(tuple(n + tokens for n in state.count))


def _ragged_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        block = Block(columns(q, done, width), columns(k, done, width), columns(v, done, width), _decay(joined))
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
    used = state.weights if rule.miras.retention.replaces else rule.project(state.weights)
    chunk = state.chunk and state.chunk.only(state.phases)
    if chunk is None:
        return rule.value(q, rule.applied(used))
    decay = _last_queries(_decay(chunk.gates), 1)
    return read_chunk(rule, used, state.momentum, q, chunk.inputs, chunk.errors, decay)


class _Walk:
    """The loop's carried values: (A, S, W), the open chunk, and the outputs so far."""

    def __init__(self, rule: Rule, state: MemoryState, traces: list[Trace] | None, compiled: bool = False):
        self.whole_chunk = _compiled_chunk() if compiled and not torch.compiler.is_compiling() else whole_chunk
        self.rule = rule
        self.size = state.chunk_size
        self.weights = state.weights
        self.used = state.weights if rule.miras.retention.replaces else rule.project(state.weights)
        self.momentum = state.momentum
        self.chunk = state.chunk
        self.pieces: list[Tensor] = []
        self.traces = traces

    def outputs(self) -> Tensor:
        return torch.cat(self.pieces, 1) if len(self.pieces) != 1 else self.pieces[0]

    def state(self, count: tuple[int, ...]) -> MemoryState:
        return MemoryState(self.weights, self.momentum, self.chunk, count, self.size)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, decay: Decay) -> None:
        """A whole chunk at once, all rows in step."""
        y, self.weights, self.momentum, self.used = self.whole_chunk(
            self.rule, self.weights, self.momentum, self.used, q, k, v, decay
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
            if not self.rule.miras.retention.identity:
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
        inputs, errors, residual = self.rule.gradient_factors(self.used, block.k, block.v)
        if self.traces is not None:
            norms = (map_kind(w).surprise(a, e) for w, a, e in zip(self.used, inputs, errors, strict=True))
            self.traces.append(
                Trace(sum(norms, start=torch.zeros(())).sqrt(), self.rule.miras.bias.loss(residual, None))
            )
        if self.chunk is not None:
            inputs = tuple(torch.cat(pair, 1) for pair in zip(self.chunk.inputs, inputs, strict=True))
            errors = tuple(torch.cat(pair, 1) for pair in zip(self.chunk.errors, errors, strict=True))
        decay = _last_queries(block.decay, block.q.shape[1])
        return read_chunk(self.rule, self.used, self.momentum, block.q, inputs, errors, decay), inputs, errors


def whole_chunk(
    rule: Rule,
    weights: Maps,
    momentum: Maps,
    used: Maps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
) -> tuple[Tensor, Maps, Maps, Maps]:
    """One chunk from start to end, all rows in step: the hot path, and the unit that ``torch.compile`` sees.

    Returns:
        y [G, C, D] and (A, S, W) at the chunk's end.
    """
    inputs, errors, _ = rule.gradient_factors(used, k, v)
    y = read_chunk(rule, used, momentum, q, inputs, errors, decay)
    weights, momentum, used = fold(rule, weights, momentum, inputs, errors, decay)
    return finish(rule, used, q, y), weights, momentum, used


def read_chunk(rule: Rule, used: Maps, momentum: Maps, q: Tensor, inputs: Maps, errors: Maps, decay: Decay) -> Tensor:
    """Every query at its own token's weights."""

    def read(i: int, x: Tensor) -> Tensor:
        return map_kind(used[i]).read(x, used[i], momentum[i] if momentum else None, inputs[i], errors[i], decay)

    return rule.value(q, read)


def finish(rule: Rule, used: Maps, q: Tensor, y: Tensor) -> Tensor:
    """A chunk's last token reads the weights that the next chunk starts from."""
    if rule.miras.retention.identity:
        return y
    return torch.cat((y[:, :-1], rule.value(q[:, -1:], rule.applied(used))), 1)


def fold(
    rule: Rule, weights: Maps, momentum: Maps, inputs: Maps, errors: Maps, decay: Decay
) -> tuple[Maps, Maps, Maps]:
    """(A, S, W) at the chunk's end."""
    share = decay.kernel[:, -1].unsqueeze(-1)
    new_weights, new_momentum = [], []
    for i, a0 in enumerate(weights):
        kind, flat = map_kind(a0), (-1,) + (1,) * (a0.dim() - 1)
        base = a0 if decay.retained is None else decay.retained[:, -1].reshape(flat) * a0
        if decay.pushed is not None and decay.carried is not None and decay.momentum_kernel is not None:
            base = torch.addcmul(base, decay.pushed[:, -1].reshape(flat), momentum[i])
            carried = decay.carried.reshape(flat) * momentum[i]
            new_momentum.append(kind.write(carried, inputs[i], errors[i], decay.momentum_kernel))
        new_weights.append(kind.write(base, inputs[i], errors[i], share))
    closed, used = rule.close(tuple(new_weights))
    return closed, tuple(new_momentum), used


@cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Maps, Maps, Maps]]:
    return torch.compile(whole_chunk, dynamic=False)


def _decay(gates: Gates) -> Decay:
    return chunk_decay(gates.theta, gates.eta, gates.alpha, gates.write)


def _slice_gates(gates: Gates, start: int, stop: int) -> Gates:
    return gates.map(lambda g: g[:, start:stop])


def _fold_gates(gates: Gates, chunks: int) -> Gates:
    return gates.map(lambda g: g.unflatten(1, (chunks, -1)))


def _unbind(decay: Decay, chunks: int) -> list[Decay]:
    fields = (decay.kernel, decay.retained, decay.pushed, decay.carried, decay.momentum_kernel)
    parts = [(None,) * chunks if f is None else f.unbind(1) for f in fields]
    return [Decay(*part) for part in zip(*parts, strict=True)]


def _last_queries(decay: Decay, count: int) -> Decay:
    if decay.kernel.shape[-2] == count:
        return decay
    rows = (decay.kernel, decay.retained, decay.pushed)
    return Decay(*(None if r is None else r[:, -count:] for r in rows), decay.carried, decay.momentum_kernel)  # type: ignore[arg-type]
