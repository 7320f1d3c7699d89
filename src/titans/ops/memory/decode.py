"""One token of every row: the dual form with a chunk of fixed size and the current row of each of its kernels.

The engines keep an open chunk as its tokens and form K, P and m from all their gates at every call. Here a token adds
one column and brings row t of each up to date, which is O(C), and no shape ever changes:

    L_t[i] θ_i = η_t L_{t-1}[i] θ_i  (θ_t at i = t)           h_t = η_t h_{t-1}
    K_t[i] θ_i = (1 - α_t) K_{t-1}[i] θ_i + w_t L_t[i] θ_i    m_t = (1 - α_t) m_{t-1} + w_t h_t
    P_t = (1 - α_t) P_{t-1}

with L for Lη of math.md §3. h and m follow the recursions of L and K, so they stand in one more column of theirs.
Columns that the chunk has not filled yet have weight 0 in L and K. Reads and the chunk's end are the general engine's.

Legend: B batch, H heads, G = B·H rows, C chunk, p tokens in the open chunk, n numbers of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.miras import MirasConfig
from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.chunked import decays_of, fold, read_chunk
from titans.ops.memory.decay import Decay
from titans.ops.memory.native.step import StepSettings, StepToken, recall_rows, step_rows
from titans.ops.memory.rule import Maps, RowRule, Rule
from titans.ops.memory.scan import memory_start
from titans.ops.memory.state import MemoryState, OpenChunk, StepMemory
from titans.ops.memory.tokens import Gates, Tokens
from titans.ops.place import Place, branch, choose, unchanged
from titans.ops.rows import columns, valid
from titans.state import counts

Kept = tuple[Tensor, Maps, Maps, Maps, Maps]
"""A token's read y [G, 1, D], A, S and W per map, and the kernels' rows, all of which may change with a chunk's end."""


def unstepped(miras: MirasConfig) -> str | None:
    """Why a rule has no step of fixed shapes, as the end of a sentence; None where it has."""
    return None if miras.gates == "head" else f"gates are per {miras.gates}, not per head"


def step(rule: Rule, tokens: Tokens, state: StepMemory, place: Place, offset: int = 0) -> tuple[Tensor, StepMemory]:
    """Write one token per row into the memory and read it right after, as `titans.ops.memory.scan` does.

    Args:
        rule, tokens: in the public layout, [B, 1, H, ...].
        state: where the rows' memories stand.
        place: where the streams stand.
        offset: tokens that the memory had read before each stream's first.

    Returns:
        y [B, 1, H, D] in q's dtype, and the new state.
    """
    with torch.autocast(tokens.q.device.type, enabled=False):
        one = tokens.each(lambda x: x.to(state.tokens.dtype).squeeze(1))
        y, state = _read(rule, one, state, place, offset)
        rows, some = place.ends(state.tokens.shape[2], offset)
        if torch.compiler.is_compiling() or bool(some):
            y, state = _end(rule, one.q, y, state, rows, some)
    return y.unsqueeze(1).to(tokens.q.dtype), state


def step_compiled(
    rule: Rule, token: StepToken, settings: StepSettings, state: StepMemory, place: Place, offset: int = 0
) -> tuple[Tensor, bool, StepMemory, Tensor | None]:
    """A whole layer's step between its projections, but for a chunk's end, in C++.

    The native engine must be one for the rule and the device, and all tensors of one dtype.

    Returns:
        y [B, 1, d_model], normalised and gated unless the next says no; whether it is; the new state; and the
        convolution's new tail.
    """
    size = state.tokens.shape[2]
    changed = ("kernel", "push", "retained", *(() if place.extends(size, offset) else ("tokens",)))
    state = replace(state, **{n: x.clone() for n in changed if (x := getattr(state, n)) is not None})
    known = ChunkRule.of(rule.miras, size, rule.initial, *(rule.norm or (None, None)))
    q, y, out, tail = step_rows(known, token, settings, state, place.column(size, offset), place.active)
    rows, some = place.ends(size, offset)
    if not bool(some):
        return out, True, state, tail
    y, state = _end(rule, q, y, state, rows, some)
    return y.flatten(1).unsqueeze(1), False, state, tail


def _end(rule: Rule, q: Tensor, y: Tensor, state: StepMemory, rows: Tensor, some: Tensor) -> tuple[Tensor, StepMemory]:
    """What a chunk's last token changes, its own read y [B, H, D] included, if a row has come to it."""
    batch, heads = y.shape[:2]

    def close(q: Tensor, stored: Tensor, rows: Tensor, kept: Kept) -> Kept:
        return _close(rule.expand(batch, state.tokens.dtype), q, stored, rows, kept)

    maps = (_flat(m) for m in (state.weights, state.momentum, state.used))
    sums = _flat(tuple(x for x in (state.kernel, state.push, state.retained) if x is not None))
    flat_q, flat_y = (x.reshape(batch * heads, 1, -1) for x in (q, y))
    given = (flat_q, state.tokens.flatten(0, 1), rows, (flat_y, *maps, sums))
    y, *kept = branch(some, close, _leave, given)
    return y.view(batch, heads, -1), _state(batch, state.tokens, *kept)


def _read(rule: Rule, one: Tokens, state: StepMemory, place: Place, offset: int) -> tuple[Tensor, StepMemory]:
    """Write and read a token that does not complete a chunk, [B, H, ·]; y [B, H, D]."""
    batch, heads, size = state.tokens.shape[:3]
    dtype = state.tokens.dtype
    flat = one.each(lambda x: x.reshape(batch * heads, 1, *x.shape[2:]))
    if flat.delta is not None and flat.delta.dim() == 2:
        flat = replace(flat, delta=flat.delta.unsqueeze(-1))
    if place.active is not None:
        flat = replace(flat, gates=flat.gates.where(place.active.repeat_interleave(heads).unsqueeze(1)))
    bound = rule.reading(batch, dtype)
    weights, momentum, used = (_flat(m) for m in (state.weights, state.momentum, state.used))
    inputs, errors, _ = bound.gradient_factors(used or weights, flat.k, flat.v, flat.delta)
    column = torch.cat((*inputs, *errors, *_numbers(flat.gates, place)), -1).unflatten(0, (batch, heads))
    stored = place.put(state.tokens, place.column(size, offset), column, place.extends(size, offset))
    sums = _advance(state, flat.gates, place.mark(size, offset, state.kernel.shape[2], dtype))
    inputs, errors, rest = _split(stored.flatten(0, 1), weights)
    y = read_chunk(
        bound, weights, used or weights, momentum, flat.q, inputs, errors, _decay(sums, bool(momentum), rest)
    )
    kernel, push, retained = _named(sums, bool(momentum), batch)
    return y.view(batch, heads, -1), replace(state, tokens=stored, kernel=kernel, push=push, retained=retained)


def _close(rule: RowRule, q: Tensor, stored: Tensor, rows: Tensor, kept: Kept) -> Kept:
    """In the samples ``rows`` [B] whose chunk is complete: their last token's read, A, S, W and fresh kernels."""
    y, *olds = kept
    weights, momentum, _, sums = olds
    inputs, errors, rest = _split(stored, weights)
    ends = fold(rule, weights, momentum, inputs, errors, _decay(sums, bool(momentum), rest))
    if not rule.expansion_is_exact:
        y = choose(rows, rule.value(q, rule.applied(ends[2])), y)
    pairs = zip((*ends, _fresh_sums(sums, bool(momentum))), olds, strict=True)
    return y, *(tuple(choose(rows, n, o) for n, o in zip(new, old, strict=False)) for new, old in pairs)  # type: ignore[return-value]


def _leave(q: Tensor, stored: Tensor, rows: Tensor, kept: Kept) -> Kept:
    """Nothing changes."""
    y, *olds = kept
    return unchanged(y), *(tuple(map(unchanged, maps)) for maps in olds)  # type: ignore[return-value]


def _advance(state: StepMemory, gates: Gates, mark: Tensor) -> Maps:
    """Row t of the kernels from row t - 1: L, K and P as far as the rule has them, [G, ·].

    Args:
        gates: of token t, [G, 1].
        mark: 1 at its column, [B, 1, C or C + 1].
    """
    theta, eta, alpha, write = gates.theta, gates.eta, gates.alpha, gates.write
    assert isinstance(theta, Tensor) and not isinstance(alpha, tuple)
    kernel = state.kernel.flatten(0, 1)
    new = mark.expand(state.kernel.shape).flatten(0, 1) * theta
    keep = None if alpha is None else 1 - alpha
    sums: list[Tensor] = []
    if eta is not None and state.push is not None:
        push = torch.addcmul(new, state.push.flatten(0, 1), eta)
        sums.append(push)
        new = push if write is None else push * write
    kernel = new + kernel if keep is None else torch.addcmul(new, kernel, keep)
    if keep is not None and state.retained is not None:
        sums.append(state.retained.flatten(0, 1) * keep)
    return kernel, *sums


def _decay(sums: Maps, momentum: bool, rest: Tensor) -> Decay:
    """The kernels' row t for one query; ``rest`` [G, C, ·] are the columns' gates, θ first."""
    kernel = sums[0].unsqueeze(1)
    retained = sums[-1].unsqueeze(1) if len(sums) > 1 + momentum else None
    steps = rest[..., 0].sum(1, keepdim=True)
    if not momentum:
        return Decay(kernel, retained, None, None, None, steps)
    push = sums[1].unsqueeze(2)
    return Decay(kernel[..., :-1], retained, kernel[..., -1:], push[:, -1:], push[:, :-1], steps)


def _fresh_sums(sums: Maps, momentum: bool) -> Maps:
    """The kernels before a chunk's first token: K = L = 0, m = 0, h = 1, P = 1."""
    kernel, *others = map(torch.zeros_like, sums)
    if momentum:
        others[0][:, -1:] += 1
    return kernel, *others[:momentum], *(x + 1 for x in others[momentum:])


def _numbers(gates: Gates, place: Place) -> list[Tensor]:
    """θ, η, α and w of one token, as far as there are such, [G, 1, 1] each."""
    theta, eta, alpha, write = gates.theta, gates.eta, gates.alpha, gates.write
    assert isinstance(theta, Tensor) and not isinstance(alpha, tuple)
    write = place.once(("written", theta.shape), lambda: torch.ones_like(theta)) if write is None else write
    return [g.unsqueeze(-1) for g in (theta, eta, alpha, write) if g is not None]


def _split(stored: Tensor, weights: Maps) -> tuple[Maps, Maps, Tensor]:
    """a and δ of every map, and the gates, of columns [G, C, n]."""
    widths = [w.shape[-1] for w in weights] + [w.shape[1] for w in weights]
    *parts, rest = stored.split([*widths, stored.shape[2] - sum(widths)], 2)
    return tuple(parts[: len(weights)]), tuple(parts[len(weights) :]), rest


def _flat(maps: Maps) -> Maps:
    return tuple(w.flatten(0, 1) for w in maps)


def _state(batch: int, tokens: Tensor, weights: Maps, momentum: Maps, used: Maps, sums: Maps) -> StepMemory:
    a, s, w = (tuple(x.unflatten(0, (batch, -1)) for x in m) for m in (weights, momentum, used))
    return StepMemory(a, s, w, tokens, *_named(sums, bool(momentum), batch))


def _named(sums: Maps, momentum: bool, batch: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """kernel, push and retained [B, H, ·] of those that there are, [G, ·]."""
    kernel, *others = (x.unflatten(0, (batch, -1)) for x in sums)
    push = others.pop(0) if momentum else None
    return kernel, push, others[0] if others else None


def read(rule: Rule, q: Tensor, used: Maps) -> Tensor:
    """Read q [B, n, H, D] at the weights W = φ(A), [B, H, out, in] per map."""
    batch, _, heads, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        bound = rule.reading(batch, used[0].dtype)
        flat = q.to(used[0].dtype).transpose(1, 2).flatten(0, 1)
        y = bound.value(flat, bound.applied(_flat(used)))
        return y.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype)


def read_compiled(
    rule: Rule, token: StepToken, settings: StepSettings, used: Maps, active: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`recall_rows` of a layer's rule, which the native engine must know."""
    known = ChunkRule.of(rule.miras, rule.chunk_size, rule.initial, *(rule.norm or (None, None)))
    return recall_rows(known, token, settings, used, active)


def shown(rule: Rule, weights: Maps) -> Maps:
    """W = φ(A) of weights A [B, H, out, in] at a chunk's start; empty where A is itself replaced by it."""
    if rule.miras.retention.identity or rule.miras.retention.replaces:
        return ()
    batch = weights[0].shape[0]
    used = rule.expand(batch, weights[0].dtype).use(_flat(weights))
    return tuple(w.unflatten(0, (batch, -1)) for w in used)


def begin(rule: Rule, state: MemoryState, seen: Sequence[int]) -> StepMemory:
    """The same memory in tensors of fixed shapes, none of them shared with ``state``'s chunk.

    Args:
        rule: as in `step`.
        state: what an earlier call left.
        seen: tokens that the memory has read of each row's stream; rows that ``state`` calls fresh start from A_0.
    """
    batch, heads, size = len(seen), rule.heads, rule.chunk_size
    dtype = torch.promote_types(rule.initial[0].dtype, torch.float32)  # a state may have been cast
    flat = memory_start(rule, state, tuple(seen), dtype).begun([n for n in seen for _ in range(heads)])
    phases = [n % size for n in seen for _ in range(heads)]
    chunk, gates = flat.chunk, flat.chunk.gates.storable()
    assert isinstance(gates.theta, Tensor) and not isinstance(gates.alpha, tuple)
    numbers = [g.unsqueeze(-1) for g in (gates.theta, gates.eta, gates.alpha, gates.write) if g is not None]
    tokens = _left(torch.cat((*chunk.inputs, *chunk.errors, *numbers), -1), phases, size)
    sums = _sums(gates, phases, size, bool(flat.momentum))
    found = _state(batch, tokens.unflatten(0, (batch, heads)), flat.weights, flat.momentum, (), sums)
    return replace(found, used=shown(rule, found.weights))


def _sums(gates: Gates, phases: Sequence[int], size: int, momentum: bool) -> Maps:
    """The kernels' row of the last of right-aligned columns; gates [G, p]."""
    one = gates.plain.new_ones(gates.plain.shape[0], 1)
    kernel = one.new_zeros(len(one), size)
    push, pushed, carried, retained = kernel, 0 * one, one, one
    if gates.plain.shape[1]:
        ending = decays_of(gates).of_map(0).ending()
        kernel = _left(ending.share, phases, size).squeeze(-1)
        retained = one if ending.retained is None else ending.retained
        if ending.momentum_share is not None and ending.pushed is not None and ending.carried is not None:
            push = _left(ending.momentum_share, phases, size).squeeze(-1)
            pushed, carried = ending.pushed, ending.carried
    found = (torch.cat((kernel, pushed), 1), torch.cat((push, carried), 1)) if momentum else (kernel,)
    return found if gates.alpha is None else (*found, retained)


def end(state: StepMemory, seen: Sequence[int]) -> MemoryState:
    """Undo `begin`, of rows that have read ``seen`` tokens by now."""
    batch, heads, size = state.tokens.shape[:3]
    phases = [n % size for n in seen for _ in range(heads)]
    width, weights = max(phases), _flat(state.weights)
    laid = columns(state.tokens.flatten(0, 1), [p - width for p in phases], width)
    inputs, errors, rest = _split(laid, weights)
    theta, *others, write = rest.unbind(-1)
    eta = others.pop(0) if state.push is not None else None
    gates = Gates(theta, eta, others[0] if others else None, write)
    chunk = OpenChunk(inputs, errors, gates).only(phases, width)
    flat = MemoryState(weights, _flat(state.momentum), chunk, counts(list(seen)), size)
    return flat.each(lambda x: x.unflatten(0, (batch, heads)), flat.read)


def _left(x: Tensor, phases: Sequence[int], size: int) -> Tensor:
    """Right-aligned columns [G, p, ...] from column 0 on, with zeros up to ``size``."""
    width = x.shape[1]
    if any(p != width for p in phases):
        real = valid(phases, width, x.device).unsqueeze(-1)
        x = columns(x, [width - p for p in phases], width).masked_fill(~real, 0)
    return F.pad(x, (0, 0, 0, size - width))
