"""The law in code: math.md §2, one token after the other, the inner gradient taken by autograd.

Slow on purpose and independent of the dual form: it holds every token's weights for real. Legend as in chunked.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.memory.chunked import Scanned
from titans.ops.memory.maps import map_kind, where_rows
from titans.ops.memory.rule import Maps, RowRule
from titans.ops.memory.state import MemoryState, OpenChunk
from titans.ops.memory.tokens import Gates, Tokens
from titans.ops.rows import Rows, columns
from titans.state import counts


def reference_scan(rule: RowRule, tokens: Tokens, state: MemoryState, rows: Rows) -> Scanned:
    """Same arguments and results as ``chunked_scan``."""
    size, groups = state.chunk_size, tokens.q.shape[0] // len(rows.seen)
    each = [documents for documents in map(rows.documents, range(len(rows.seen))) for _ in range(groups)]
    lengths = [n for n in rows.counts for _ in range(groups)]
    begins = [{d.start for d in documents[1:]} for documents in each]
    phases = [d[0].seen % size for d in each]
    state = state.begun([d[0].seen for d in each])
    new = start = _Now(state.weights, rule.use(state.weights), state.momentum, _no_steps(state.weights))
    fresh = _Now(rule.initial, rule.use(rule.initial), tuple(map(torch.zeros_like, state.momentum)), start.steps)
    now = _replay(rule, state, start, [p if n else 0 for p, n in zip(phases, state.count, strict=True)])
    factors: list[tuple[Maps, Maps]] = []
    outputs = []
    for t in range(rows.tokens):
        anew = torch.tensor([t in b for b in begins], device=tokens.q.device)
        start, now = fresh.where(anew, start), fresh.where(anew, now)
        phases = [0 if t in b else p for p, b in zip(phases, begins, strict=True)]
        token = tokens.each(lambda x, t=t: x[:, t : t + 1])
        real = torch.tensor([t < n for n in lengths], device=tokens.q.device)
        inputs, errors, gradients = _gradients(rule, start.shown, token)
        factors.append((inputs, errors))
        new = _write(rule, start, now, gradients, token.gates.each(lambda g: g[:, 0]))
        now = new.where(real, now)

        phases = [p + (t < n) for p, n in zip(phases, lengths, strict=True)]
        closing = torch.tensor([p == size for p in phases], device=tokens.q.device)
        now = _close(rule, now).where(closing, now)
        outputs.append(rule.value(token.q, rule.applied(now.shown)))
        start = now.where(closing, start)
        phases = [p % size for p in phases]
    chunk = _open_chunk(state.chunk, factors, tokens.gates, lengths, phases)
    read = counts([n for n in rows.after for _ in range(groups)])
    return Scanned(torch.cat(outputs, 1), MemoryState(start.weights, start.momentum, chunk, read, size))


@dataclass(frozen=True)
class _Now:
    """Right after a token, per map: A_t, the weights that a read uses, S_t, and Σθ of the chunk so far."""

    weights: Maps
    shown: Maps
    momentum: Maps
    steps: Maps

    def where(self, rows: Tensor, other: _Now) -> _Now:
        """This for the rows [G] that are True, ``other`` for the others."""
        mine, theirs = (vars(x).values() for x in (self, other))
        return _Now(*(where_rows(rows, a, b) for a, b in zip(mine, theirs, strict=True)))


def _no_steps(weights: Maps) -> Maps:
    return tuple(torch.zeros_like(w[..., :1] if w.dim() == 3 else w) for w in weights)


def _gradients(rule: RowRule, weights: Maps, token: Tokens) -> tuple[Maps, Maps, Maps]:
    """Per map: its input, the error at its output, and the gradient with respect to its weights, all by autograd."""
    outside = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of parameters that were made under no_grad say that they require a gradient but have no graph.
        weights = tuple(w if outside and w.requires_grad else w.detach().requires_grad_() for w in weights)
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def apply(i: int, x: Tensor) -> Tensor:
            inputs.append(x)
            outputs.append(map_kind(weights[i]).apply(weights[i], x))
            return outputs[-1]

        prediction = rule.value(token.k, apply)
        cotangent = rule.miras.bias.error(prediction - token.v, token.delta)
        found = torch.autograd.grad(prediction, (*outputs, *weights), cotangent, create_graph=True)
    return tuple(inputs), found[: len(outputs)], found[len(outputs) :]


def _write(rule: RowRule, start: _Now, now: _Now, gradients: Maps, gate: Gates) -> _Now:
    """One token of S_t = η_t S_{t-1} - θ_t g_t, A_t = (1 - α_t) A_{t-1} + S_t, and of what a read in the chunk sees."""
    retention, algorithm = rule.miras.retention, rule.miras.algorithm
    weights, shown, momentum, steps = [], [], [], []
    for i, (w, g) in enumerate(zip(now.weights, gradients, strict=True)):
        theta, keep = _of_map(gate.theta, i, g), 1 - _of_map(gate.alpha, i, g)
        surprise = -theta * g
        if gate.eta is not None:
            surprise = _of_map(gate.eta, i, g) * now.momentum[i] + surprise
            momentum.append(surprise)
        push = torch.zeros_like(surprise) if algorithm.per_chunk else surprise
        if gate.write is not None:
            push = _of_map(gate.write, i, g) * push
        pull = (1 - keep) * rule.anchors[i] if retention.decays_to_initial and rule.anchors is not None else 0
        weights.append(keep * w + push + pull)
        view = rule.view(i, start.weights)
        lasting = torch.zeros_like(w) if view.fades else start.shown[i]
        written = view.shown(push) if view.writes else 0
        shown.append(lasting + keep * (now.shown[i] - lasting) + written)
        steps.append(now.steps[i] + theta)
    return _Now(tuple(weights), tuple(shown), tuple(momentum), tuple(steps))


def _of_map(gate: Tensor | tuple[Tensor, ...] | None, i: int, weight: Tensor) -> Tensor:
    """A token's gate, [G] or per map [G, out], in a shape that multiplies map i's weights; no gate counts as 0."""
    if gate is None:
        return weight.new_zeros(())
    found = gate[i] if isinstance(gate, tuple) else gate.unsqueeze(-1)
    return found.unsqueeze(-1) if weight.dim() == 3 else found


def _close(rule: RowRule, now: _Now) -> _Now:
    """The chunk's end."""
    weights = now.weights
    if rule.miras.algorithm.per_chunk:
        assert rule.steps is not None
        learned = (s.view((-1,) + (1,) * (w.dim() - 1)) for s, w in zip(rule.steps, weights, strict=True))
        updates = (rule.update(s, n.flatten(1)) for s, n in zip(now.momentum, now.steps, strict=True))
        weights = tuple(w + s * n * u for w, s, n, u in zip(weights, learned, now.steps, updates, strict=True))
    closed, used = rule.close(weights)
    return _Now(closed, used, now.momentum, _no_steps(weights))


def _replay(rule: RowRule, state: MemoryState, start: _Now, phases: Sequence[int]) -> _Now:
    """Right after the last token seen, from the open chunk's start."""
    now, width = start, state.chunk.width
    for t in range(width):
        real = torch.tensor([t >= width - p for p in phases], device=start.weights[0].device)
        factors = zip(start.weights, state.chunk.inputs, state.chunk.errors, strict=True)
        gradients = tuple(map_kind(w).gradient(a[:, t], e[:, t]) for w, a, e in factors)
        written = _write(rule, start, now, gradients, state.chunk.gates.each(lambda g, t=t: g[:, t]))
        now = written.where(real, now)
    return now


def _open_chunk(
    old: OpenChunk, factors: list[tuple[Maps, Maps]], gates: Gates, lengths: list[int], phases: list[int]
) -> OpenChunk:
    """The last tokens of every row, right-aligned to the longest open chunk."""
    width, stored = max(phases), old.width
    starts = [stored + n - width for n in lengths]
    inputs, errors = (
        tuple(columns(torch.cat([kept[i], *(f[side][i] for f in factors)], 1), starts, width) for i in range(len(kept)))
        for side, kept in enumerate((old.inputs, old.errors))
    )
    joined = old.gates.then(gates) if stored else gates.storable()
    return OpenChunk(inputs, errors, joined.each(lambda g: columns(g, starts, width))).only(phases, width)
