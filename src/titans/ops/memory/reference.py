"""The law in code: math.md §2, one token after the other, the inner gradient taken by autograd.

Slow on purpose and independent of the dual form: it holds every token's weights for real. Legend as in chunked.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.memory.rule import Rule, map_kind, where_rows
from titans.ops.memory.state import Gates, MemoryState, OpenChunk
from titans.ops.ragged import columns

Maps = tuple[Tensor, ...]


def reference_scan(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    gates: Gates,
    state: MemoryState,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, MemoryState]:
    """Same arguments and results as ``chunked_scan``."""
    size, tokens = state.chunk_size, q.shape[1]
    counts = list(lengths) if lengths is not None else [tokens] * q.shape[0]
    phases = list(state.phases)
    start = _Now(state.weights, rule.use(state.weights), state.momentum, _no_steps(state.weights))
    now = _replay(rule, state, start)
    factors: list[tuple[Maps, Maps]] = []
    outputs = []
    for t in range(tokens):
        column = slice(t, t + 1)
        real = torch.tensor([t < n for n in counts], device=q.device)
        threshold = None if delta is None else delta[:, column]
        inputs, errors, gradients = _gradients(rule, start.shown, k[:, column], v[:, column], threshold)
        factors.append((inputs, errors))
        written = _write(rule, start, now, gradients, gates.map(lambda g, t=t: g[:, t]))
        now = written.where(real, now)

        phases = [p + (t < n) for p, n in zip(phases, counts, strict=True)]
        closing = torch.tensor([p == size for p in phases], device=q.device)
        now = _close(rule, now).where(closing, now)
        outputs.append(rule.value(q[:, column], rule.applied(now.shown)))
        start = now.where(closing, start)
        phases = [p % size for p in phases]
    chunk = _open_chunk(state, factors, gates, counts, phases)
    count = tuple(c + n for c, n in zip(state.count, counts, strict=True))
    return torch.cat(outputs, 1), MemoryState(start.weights, start.momentum, chunk, count, size)


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


def _gradients(rule: Rule, weights: Maps, k: Tensor, v: Tensor, delta: Tensor | None) -> tuple[Maps, Maps, Maps]:
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

        prediction = rule.value(k, apply)
        cotangent = rule.miras.bias.error(prediction - v, delta)
        found = torch.autograd.grad(prediction, (*outputs, *weights), cotangent, create_graph=True)
    return tuple(inputs), found[: len(outputs)], found[len(outputs) :]


def _write(rule: Rule, start: _Now, now: _Now, gradients: Maps, gate: Gates) -> _Now:
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
        pulls = retention.pulls and rule.anchors is not None
        weights.append(keep * w + push + ((1 - keep) * rule.anchors[i] if pulls and rule.anchors else 0))
        if retention.inside == "hidden":
            shown.append(start.shown[i])
        elif retention.inside == "scaled" and rule.anchors is not None:
            shown.append(weights[i] * retention.factor(start.weights[i], rule.anchors[i]))
        elif pulls:
            shown.append(start.shown[i] + keep * (now.shown[i] - start.shown[i]) + push)
        else:
            shown.append(keep * now.shown[i] + push)
        steps.append(now.steps[i] + theta)
    return _Now(tuple(weights), tuple(shown), tuple(momentum), tuple(steps))


def _of_map(gate: Tensor | tuple[Tensor, ...] | None, i: int, weight: Tensor) -> Tensor:
    """A token's gate, [G] or per map [G, out], in a shape that multiplies map i's weights; no gate counts as 0."""
    if gate is None:
        return weight.new_zeros(())
    found = gate[i] if isinstance(gate, tuple) else gate.unsqueeze(-1)
    return found.unsqueeze(-1) if weight.dim() == 3 else found


def _close(rule: Rule, now: _Now) -> _Now:
    """The chunk's end."""
    weights = now.weights
    if rule.miras.algorithm.per_chunk:
        assert rule.steps is not None
        learned = (s.view((-1,) + (1,) * (w.dim() - 1)) for s, w in zip(rule.steps, weights, strict=True))
        updates = (rule.update(s, n.flatten(1)) for s, n in zip(now.momentum, now.steps, strict=True))
        weights = tuple(w + s * n * u for w, s, n, u in zip(weights, learned, now.steps, updates, strict=True))
    closed, used = rule.close(weights)
    return _Now(closed, used, now.momentum, _no_steps(weights))


def _replay(rule: Rule, state: MemoryState, start: _Now) -> _Now:
    """Right after the last token seen, from the open chunk's start."""
    if state.chunk is None:
        return start
    now, width = start, state.chunk.width
    for t in range(width):
        real = torch.tensor([t >= width - p for p in state.phases], device=start.weights[0].device)
        gradients = tuple(
            e[:, t, :, None] * a[:, t, None, :] if w.dim() == 3 else e[:, t] * a[:, t]
            for w, a, e in zip(start.weights, state.chunk.inputs, state.chunk.errors, strict=True)
        )
        written = _write(rule, start, now, gradients, state.chunk.gates.map(lambda g, t=t: g[:, t]))
        now = written.where(real, now)
    return now


def _open_chunk(
    state: MemoryState, factors: list[tuple[Maps, Maps]], gates: Gates, counts: list[int], phases: list[int]
) -> OpenChunk | None:
    """The last tokens of every row, right-aligned to the longest open chunk."""
    if not (width := max(phases)):
        return None
    old = state.chunk
    stored = 0 if old is None else old.width
    starts = [stored + n - width for n in counts]

    maps = range(len(factors[0][0]))
    found = [[torch.cat([f[side][i] for f in factors], 1) for i in maps] for side in (0, 1)]
    if old is not None:
        found = [[torch.cat(pair, 1) for pair in zip(p, n)] for p, n in zip((old.inputs, old.errors), found)]
        gates = old.gates.then(gates)
    inputs, errors = (tuple(columns(x, starts, width) for x in side) for side in found)
    return OpenChunk(inputs, errors, gates.map(lambda g: columns(g, starts, width))).only(phases)
