"""The law in code: math.md §2, one token after the other, the inner gradient taken by autograd.

Slow on purpose and independent of the dual form: it holds every token's weights for real. Legend as in chunked.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.ops.memory.rule import Rule, map_kind, where_rows
from titans.ops.memory.state import Gates, MemoryState, OpenChunk
from titans.ops.ragged import columns

Maps = tuple[Tensor, ...]


def reference_scan(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: MemoryState, lengths: Sequence[int] | None = None
) -> tuple[Tensor, MemoryState]:
    """Same arguments and results as ``chunked_scan``."""
    size, tokens = state.chunk_size, q.shape[1]
    counts = list(lengths) if lengths is not None else [tokens] * q.shape[0]
    phases = list(state.phases)
    start_weights, start_momentum = state.weights, state.momentum
    start_used = start_weights if rule.miras.retention.replaces else rule.project(start_weights)
    weights, momentum = _replay(state)
    factors: list[tuple[Maps, Maps]] = []
    outputs = []
    for t in range(tokens):
        now = slice(t, t + 1)
        real = torch.tensor([t < n for n in counts], device=q.device)
        inputs, errors, gradients = _gradients(rule, start_used, k[:, now], v[:, now])
        factors.append((inputs, errors))
        token = gates.map(lambda g, t=t: g[:, t])
        new_weights, new_momentum = _write(weights, momentum, gradients, token)
        weights, momentum = where_rows(real, new_weights, weights), where_rows(real, new_momentum, momentum)

        phases = [p + (t < n) for p, n in zip(phases, counts, strict=True)]
        closing = torch.tensor([p == size for p in phases], device=q.device)
        closed_weights, closed_used = rule.close(weights)
        read = where_rows(closing, closed_used, weights)
        outputs.append(rule.value(q[:, now], rule.applied(read)))

        weights = where_rows(closing, closed_weights, weights)
        start_weights = where_rows(closing, weights, start_weights)
        start_used = where_rows(closing, closed_used, start_used)
        start_momentum = where_rows(closing, momentum, start_momentum)
        phases = [p % size for p in phases]
    chunk = _open_chunk(state, factors, gates, counts, phases)
    count = tuple(c + n for c, n in zip(state.count, counts, strict=True))
    return torch.cat(outputs, 1), MemoryState(start_weights, start_momentum, chunk, count, size)


def _gradients(rule: Rule, weights: Maps, k: Tensor, v: Tensor) -> tuple[Maps, Maps, Maps]:
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
        cotangent = rule.miras.bias.error(prediction - v, None)
        found = torch.autograd.grad(prediction, (*outputs, *weights), cotangent, create_graph=True)
    return tuple(inputs), found[: len(outputs)], found[len(outputs) :]


def _write(weights: Maps, momentum: Maps, gradients: Maps, gate: Gates) -> tuple[Maps, Maps]:
    """One token of S_t = η_t S_{t-1} - θ_t g_t, W_t = (1 - α_t) W_{t-1} + S_t; gates [G]."""

    def per_map(g: Tensor, like: Tensor) -> Tensor:
        return g.view((-1,) + (1,) * (like.dim() - 1))

    new_weights, new_momentum = [], []
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        surprise = -per_map(gate.theta, g) * g
        if gate.eta is not None:
            surprise = per_map(gate.eta, g) * momentum[i] + surprise
            new_momentum.append(surprise)
        if gate.write is not None:
            surprise = per_map(gate.write, g) * surprise
        new_weights.append((w if gate.alpha is None else (1 - per_map(gate.alpha, g)) * w) + surprise)
    return tuple(new_weights), tuple(new_momentum)


def _replay(state: MemoryState) -> tuple[Maps, Maps]:
    """The weights and momentum right after the last token seen, from the open chunk's start."""
    weights, momentum = state.weights, state.momentum
    if state.chunk is None:
        return weights, momentum
    width = state.chunk.gates.theta.shape[1]
    for t in range(width):
        real = torch.tensor([t >= width - p for p in state.phases], device=weights[0].device)
        gradients = tuple(
            e[:, t, :, None] * a[:, t, None, :] if w.dim() == 3 else e[:, t] * a[:, t]
            for w, a, e in zip(weights, state.chunk.inputs, state.chunk.errors, strict=True)
        )
        new = _write(weights, momentum, gradients, state.chunk.gates.map(lambda g, t=t: g[:, t]))
        weights, momentum = where_rows(real, new[0], weights), where_rows(real, new[1], momentum)
    return weights, momentum


def _open_chunk(
    state: MemoryState, factors: list[tuple[Maps, Maps]], gates: Gates, counts: list[int], phases: list[int]
) -> OpenChunk | None:
    """The last tokens of every row, right-aligned to the longest open chunk."""
    if not (width := max(phases)):
        return None
    old = state.chunk
    stored = 0 if old is None else old.gates.theta.shape[1]
    starts = [stored + n - width for n in counts]

    maps = range(len(factors[0][0]))
    found = [[torch.cat([f[side][i] for f in factors], 1) for i in maps] for side in (0, 1)]
    if old is not None:
        found = [[torch.cat(pair, 1) for pair in zip(p, n)] for p, n in zip((old.inputs, old.errors), found)]
        gates = old.gates.then(gates)
    inputs, errors = (tuple(columns(x, starts, width) for x in side) for side in found)
    return OpenChunk(inputs, errors, gates.map(lambda g: columns(g, starts, width))).only(phases)
