"""The memory as pure functions, whichever engine computes them: checks, and the layout that engines work in.

Legend: B batch, T tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from titans.autograd import once
from titans.miras import MirasConfig
from titans.ops.memory.chunked import chunked_scan, empty_chunk, read_open
from titans.ops.memory.engines import Engine, Scan, engine_for
from titans.ops.memory.maps import where_rows
from titans.ops.memory.rule import Rule
from titans.ops.memory.state import MemoryState, check_made_alike, rule_name
from titans.ops.memory.tokens import Gate, Gates, Tokens
from titans.ops.rows import Packing, Rows
from titans.state import counts


@dataclass(frozen=True)
class MemoryTrace:
    """What reading did to a memory, per token and head, each [B, T, H].

    Attributes:
        surprise: ‖g_t‖, the norm of the gradient over all maps.
        loss: the inner loss ℓ(W_c; k_t, v_t), at the weights of the chunk's start.
        after: the same at the weights of the chunk's end, NaN where the chunk is still open.
        theta, eta, alpha: the gates (None where a term is off), channel gates as their mean.
    """

    surprise: Tensor
    loss: Tensor
    after: Tensor
    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Gate,
    eta: Tensor | None,
    alpha: Gate | None,
    *,
    weights: tuple[Tensor, ...],
    miras: MirasConfig | None = None,
    chunk_size: int = 64,
    state: MemoryState | None = None,
    engine: Engine = "auto",
    mask: Tensor | None = None,
    store_mask: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    delta: Tensor | None = None,
    steps: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write every token into the memory, read it right after (math.md §2).

    Args:
        q, k, v: [B, T, H, D], T ≥ 1.
        theta, eta, alpha: step size, momentum decay and forgetting, [B, T, H], in their final range. None for ``eta``
            or ``alpha`` switches that term off. With ``miras.gates = "channel"`` theta and alpha are tuples with one
            [B, T, H, out] per map.
        weights: learned initial weights A_0, one per map of the architecture, [H, out, in] (vector: [H, D]).
        miras: the rule; default ``MirasConfig.steady()``.
        chunk_size: C ≥ 1; gradients are taken at the weights of the chunk's start. 1 is the sequential rule.
        state: where an earlier call stopped; None starts a new stream.
        engine: "auto", the fastest one that is exact for the rule and the device; or by name, an error where it cannot
            be used: "native" (C++, on a CPU, compiled once in seconds), "fused" (the same in torch operations), both
            for l2 memories of one or two maps; "chunked" (every rule), "compiled" (the same with each whole chunk
            through ``torch.compile``; the first call of a shape takes a minute) or "reference" (token loop, inner
            gradient by autograd).
        mask: [B, T] bool, False for padding: such a token does nothing and its output is zero.
        store_mask: [B, T] bool, False for tokens that are read but not written.
        norm: gain and bias of the LN wrapper, each [H, D]; default 1 and 0.
        delta: learned Huber threshold > 0, [B, T, H] or [B, T, H, D]; for ``Huber(delta="learned")`` alone.
        steps: for muon, per map [H] > 0: a closing chunk writes ``steps`` times its mean θ times the orthogonalised
            momentum. Default: a tenth of ‖A_0‖_F / √min(out, in), for θ between 0 and 1.

    Returns:
        y [B, T, H, D] in q's dtype, and the state. The scan itself runs in float32 at least.

    Raises:
        ValueError: a shape, dtype or state that does not fit, named.

    Source: Titans (2501.00663) Eqs. 8-16; MIRAS (2504.13173) §3-5.
    """
    if miras is not None and not isinstance(miras, MirasConfig):
        raise ValueError(f"miras must be a MirasConfig, got {miras!r}")
    for name, tensors in (("weights", weights), ("norm", norm)):
        if not isinstance(tensors, tuple | list) and not (name == "norm" and norm is None):
            raise ValueError(f"{name} must be a tuple of tensors, got {type(tensors).__name__}")
    if not isinstance(chunk_size, int):
        raise ValueError(f"chunk_size must be an integer, got {chunk_size!r}")
    rule = Rule(miras or MirasConfig.steady(), weights, chunk_size, norm, steps)
    tokens = Tokens(q, k, v, Gates(theta, eta, alpha, None), delta)
    _check(rule, tokens)
    _check_values(rule, tokens, _check_mask("mask", mask, q))
    tokens = stored(tokens, _check_mask("store_mask", store_mask, q))
    packing = None
    if mask is not None and not bool(mask.all()):
        packing = Packing.of(mask)
        tokens = tokens.each(packing.pack)
    seen = (0,) * q.shape[0] if state is None else _check_state(state, rule, tokens)
    rows = Rows(seen, packing.counts, q.shape[1]) if packing is not None else Rows.whole(seen, q.shape[1])
    y, after, _ = scan(rule, tokens, state, rows, engine_for(engine, rule.miras, q.device))
    return y if packing is None else packing.unpack(y), replace(after, rule=rule_name(rule.miras))


def scan(
    rule: Rule, tokens: Tokens, state: MemoryState | None, rows: Rows, engine: Scan = chunked_scan
) -> tuple[Tensor, MemoryState, MemoryTrace | None]:
    """`memory_scan` for tokens of a right-padded batch in the public layout; what layers call.

    Returns:
        y [B, T, H, D], the state, and the trace if ``engine`` gives one.
    """
    batch, _, heads, _ = tokens.q.shape
    dtype = torch.promote_types(tokens.q.dtype, torch.float32)
    if not torch.compiler.is_compiling():
        norm = None if rule.norm is None else (once(rule.norm[0]), once(rule.norm[1]))
        tokens, rule = tokens.each(once), replace(rule, initial=tuple(map(once, rule.initial)), norm=norm)
    with torch.autocast(tokens.q.device.type, enabled=False):
        flat = tokens.each(lambda x: x.to(dtype).transpose(1, 2).flatten(0, 1))
        if flat.delta is not None and flat.delta.dim() == 2:
            flat = replace(flat, delta=flat.delta.unsqueeze(-1))
        begun = memory_start(rule, state, rows.seen, dtype, flat.gates)
        found = engine(rule.expand(batch, dtype), flat, begun, rows)

    def back(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, heads))

    end = found.state.each(back, counts(rows.after))
    trace = None
    if found.trace is not None:
        shown = (back(x).transpose(1, 2) for x in (found.trace.surprise, found.trace.loss, found.trace.after))
        theta, alpha = (None if g is None else _mean(g) for g in (tokens.gates.theta, tokens.gates.alpha))
        assert theta is not None
        surprise, loss, after = shown
        trace = MemoryTrace(surprise, loss, after, theta, tokens.gates.eta, alpha)
    return back(found.y).transpose(1, 2).to(tokens.q.dtype), end, trace


def stored(tokens: Tokens, store_mask: Tensor | None) -> Tokens:
    """The same tokens, those with a False in ``store_mask`` [B, T] read but not written."""
    if store_mask is None:
        return tokens
    return replace(tokens, gates=tokens.gates.where(store_mask.unsqueeze(-1)))


def memory_trace(rule: Rule, tokens: Tokens, state: MemoryState | None, rows: Rows) -> MemoryTrace:
    """The surprise and inner loss of every token; arguments as `scan`."""
    trace = scan(rule, tokens, state, rows, partial(chunked_scan, traced=True))[2]
    assert trace is not None
    return trace


def memory_read(
    q: Tensor,
    *,
    weights: tuple[Tensor, ...],
    miras: MirasConfig,
    state: MemoryState | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Read q [B, T, H, D] from the memory as it stands after the last token of ``state``; nothing is written."""
    rule = Rule(miras, weights, 1 if state is None else state.chunk_size, norm)
    rule.check(*q.shape[2:])
    return read(rule, q, state)


def read(rule: Rule, q: Tensor, state: MemoryState | None) -> Tensor:
    """`memory_read` under a bound rule."""
    if state is None:
        return read_weights(rule, q, initial_weights(rule, q.shape[0], q.dtype))
    with _flat(q) as (flat, back):
        begun = memory_start(rule, state, state.count, flat.dtype)
        return back(read_open(rule.expand(q.shape[0], flat.dtype), flat, begun))


def read_weights(rule: Rule, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """Read q [B, T, H, D] from accumulated weights A at a chunk's start, [B, H, out, in] per map."""
    with _flat(q) as (flat, back):
        rows = rule.expand(q.shape[0], flat.dtype)
        used = rows.use(tuple(w.to(flat.dtype).flatten(0, 1) for w in weights))
        return back(rows.value(flat, rows.applied(used)))


class _flat:
    """A query in the engines' layout, autocast off, and the way back."""

    def __init__(self, q: Tensor):
        self.q, self.autocast = q, torch.autocast(q.device.type, enabled=False)

    def __enter__(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        q, (batch, _, heads, _) = self.q, self.q.shape
        self.autocast.__enter__()
        flat = q.to(torch.promote_types(q.dtype, torch.float32)).transpose(1, 2).flatten(0, 1)
        return flat, lambda y: y.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype)

    def __exit__(self, *exception: object) -> None:
        self.autocast.__exit__(*exception)


def initial_weights(rule: Rule, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A_0 for every sample, [B, H, out, in] per map, in float32 at least: copies, for parameters change in place."""
    dtype = torch.promote_types(dtype, torch.float32)
    return tuple(w.to(dtype, copy=True).expand(batch, *w.shape) for w in rule.initial)


def memory_start(
    rule: Rule, state: MemoryState | None, seen: tuple[int, ...], dtype: torch.dtype, gates: Gates | None = None
) -> MemoryState:
    """The state to go on from in the engines' layout, with A_0 and S = 0 filled in for fresh rows.

    Args:
        rule, state: the bound rule, and what an earlier call returned.
        seen: tokens read before, per sample.
        dtype: to work in.
        gates: those of the call, in the engines' layout: what a new state's empty chunk has. Without a state only.
    """
    known = seen if state is None else [n and s for n, s in zip(state.count, seen, strict=True)]
    read = counts([n for n in known for _ in range(rule.heads)])
    flat = None if state is None else state.each(lambda x: x.to(dtype).flatten(0, 1), read)
    if flat is not None and 0 not in known:
        return flat
    initial = tuple(w.flatten(0, 1) for w in initial_weights(rule, len(seen), dtype))
    zeros = tuple(map(torch.zeros_like, initial))
    if flat is None:
        assert gates is not None
        chunk = empty_chunk(initial, gates.each(lambda g: g[:, :0]).storable())
        return MemoryState(initial, zeros if gates.eta is not None else (), chunk, read, rule.chunk_size)
    fresh = (read == 0).to(initial[0].device)
    momentum = where_rows(fresh, zeros, flat.momentum) if flat.momentum else ()
    return replace(flat, weights=where_rows(fresh, initial, flat.weights), momentum=momentum)


def _mean(gate: Gate) -> Tensor:
    """[B, T, H] of channel gates: the mean over all channels of all maps."""
    return torch.cat(gate, -1).mean(-1) if isinstance(gate, tuple) else gate


def _check(rule: Rule, tokens: Tokens) -> None:
    q, gates, miras = tokens.q, tokens.gates, rule.miras
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be a non-empty [B, T, H, D], got {list(q.shape)}")
    for name, x in (("q", q), ("k", tokens.k), ("v", tokens.v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    rule.check(*q.shape[2:])
    _check_gate("theta", gates.theta, q, miras)
    for name, gate in (("eta", gates.eta), ("alpha", gates.alpha)):
        if gate is not None:
            _check_gate(name, gate, q, miras)
    if gates.eta is not None and not miras.algorithm.momentum:
        raise ValueError(f"eta must be None with algorithm {miras.algorithm.name!r}, which has no momentum")
    if gates.eta is None and miras.algorithm.per_chunk:
        raise ValueError(f"eta must be given with algorithm {miras.algorithm.name!r}, which writes its momentum")
    delta = tokens.delta
    if (delta is not None) != miras.bias.learned_delta:
        raise ValueError(
            f"delta must {'be given' if delta is None else 'be None'} with bias {miras.bias!r}, whose threshold is "
            f"{'learned' if delta is None else 'not learned'}"
        )
    if delta is not None and not isinstance(delta, Tensor):
        raise ValueError(f"delta must be a tensor, got {type(delta).__name__}")
    if delta is not None and delta.shape not in (q.shape[:3], q.shape):
        raise ValueError(f"delta must be {list(q.shape[:3])} or {list(q.shape)}, got {list(delta.shape)}")


def _check_values(rule: Rule, tokens: Tokens, mask: Tensor | None) -> None:
    """Everything finite and every gate in its range, where a look is cheap."""
    if tokens.q.device.type != "cpu" or torch.compiler.is_compiling():
        return
    gates, delta = tokens.gates, tokens.delta
    steps = rule.steps or ()
    ranges = (
        *(("q", tokens.q, -math.inf, math.inf), ("k", tokens.k, -math.inf, math.inf)),
        *(("v", tokens.v, -math.inf, math.inf), ("eta", gates.eta, 0.0, 1.0)),
        *(("theta", g, 0.0, math.inf) for g in _parts(gates.theta)),
        *(("alpha", g, 0.0, 1.0) for g in _parts(gates.alpha)),
        *(("delta", d, math.ulp(0.0), math.inf) for d in _parts(delta)),
    )
    for name, x, low, high in ranges:
        if x is not None:
            check_range(name, x if mask is None else x[mask], low, high)
    for name, values, low in (("weights", rule.initial, -math.inf), ("steps", steps, math.ulp(0.0))):
        for x in values:
            check_range(name, x, low, math.inf)


def _parts(gate: Gate | None) -> tuple[Tensor, ...]:
    return () if gate is None else gate if isinstance(gate, tuple) else (gate,)


def check_range(name: str, x: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise a ValueError unless every entry of ``x`` is finite and lies in [low, high]."""
    if not x.numel():
        return
    least, most = (float(end) for end in x.detach().aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError(f"{name} must be finite, got {'NaN' if math.isnan(least) else 'an infinite entry'}")
    if least < low or most > high:
        span = f"lie in [{low:g}, {high:g}]" if high < math.inf else "be positive" if low else "be at least 0"
        raise ValueError(f"{name} must {span}, got {least if least < low else most:g}")


def _check_gate(name: str, gate: Gate, q: Tensor, miras: MirasConfig) -> None:
    if not isinstance(gate, Tensor | tuple):
        raise ValueError(
            f"{name} must be a tensor, or with channel gates a tuple of tensors, got {type(gate).__name__}"
        )
    found = [list(g.shape) for g in gate] if isinstance(gate, tuple) else list(gate.shape)
    if name == "eta" or miras.gates == "head":
        if found != (wanted := list(q.shape[:3])):
            raise ValueError(f"{name} must be [B, T, H] = {wanted}, got {found}")
        return
    wanted = [[*q.shape[:3], shape[0]] for shape in miras.architecture.shapes(q.shape[-1])]
    if found != wanted:
        raise ValueError(f"{name} must be one [B, T, H, out] per map = {wanted} with gates = 'channel', got {found}")


def _check_mask(name: str, mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != q.shape[:2]):
        raise ValueError(f"{name} must be bool [B, T] = {list(q.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
    return mask


def _check_state(state: MemoryState, rule: Rule, tokens: Tokens) -> tuple[int, ...]:
    """The tokens that its rows have seen, once it fits."""
    if not isinstance(state, MemoryState):
        raise ValueError(f"state must be a MemoryState, got {type(state).__name__}")
    check_made_alike(state, rule.chunk_size, rule_name(rule.miras))
    wanted = [[tokens.q.shape[0], *w.shape] for w in rule.initial]
    if (found := [list(w.shape) for w in state.weights]) != wanted:
        raise ValueError(f"state has weights of shapes {found}, this memory and batch need {wanted}")
    if bool(state.momentum) != (momentum := tokens.gates.eta is not None):
        raise ValueError(
            f"state {'has' if state.momentum else 'lacks'} momentum, this memory {'has' if momentum else 'lacks'} it"
        )
    return state.count
