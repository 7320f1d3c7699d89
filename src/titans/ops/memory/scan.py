"""``memory_scan``: the memory as one pure function, whichever engine computes it.

Legend: B batch, T tokens, H heads, D head width; inside, G = B·H rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from titans.miras import MirasConfig
from titans.ops.memory.chunked import Trace, chunked_scan, read_open
from titans.ops.memory.reference import reference_scan
from titans.ops.memory.rule import Rule, where_rows
from titans.ops.memory.state import Gate, Gates, MemoryState
from titans.ops.ragged import compact, restore, take

Engine = Literal["chunked", "compiled", "reference"]
Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MemoryTrace:
    """What the memory felt, per token and head, each [B, T, H].

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
    engine: Engine = "chunked",
    mask: Tensor | None = None,
    store_mask: Tensor | None = None,
    norm: Norm | None = None,
    delta: Tensor | None = None,
    steps: tuple[Tensor, ...] | None = None,
    lengths: Sequence[int] | None = None,
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
        engine: "chunked" (fast), "compiled" (the same with each whole chunk through ``torch.compile``; the first call
            of a shape takes a minute) or "reference" (token loop, inner gradient by autograd).
        mask: [B, T] bool, False for padding: such a token does nothing and its output is zero.
        store_mask: [B, T] bool, False for tokens that are read but not written.
        norm: gain and bias of the LN wrapper, each [H, D]; default 1 and 0.
        delta: learned Huber threshold > 0, [B, T, H] or [B, T, H, D]; for ``Huber(delta="learned")`` alone.
        steps: for muon, per map [H] > 0: a closing chunk writes ``steps`` times its mean θ times the orthogonalised
            momentum. Default: a tenth of ‖A_0‖_F / √min(out, in), for θ between 0 and 1.
        lengths: instead of ``mask``, the number of real tokens per row of a right-padded batch.

    Returns:
        y [B, T, H, D] in q's dtype, and the state. The scan itself runs in float32 at least.

    Raises:
        ValueError: a shape, dtype or state that does not fit, named.

    Source: Titans (2501.00663) Eqs. 8-16; MIRAS (2504.13173) §3-5.
    """
    check_engine(engine)
    return _scan(
        q, k, v, Gates(theta, eta, alpha, None), weights, miras or MirasConfig.steady(), chunk_size, state, engine,
        mask, store_mask, norm, delta, steps, lengths,
    )  # fmt: skip


def check_engine(engine: str) -> None:
    """Raise a ValueError unless ``engine`` is one."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")


def memory_trace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Gate,
    eta: Tensor | None,
    alpha: Gate | None,
    *,
    weights: tuple[Tensor, ...],
    miras: MirasConfig,
    chunk_size: int,
    state: MemoryState | None = None,
    norm: Norm | None = None,
    delta: Tensor | None = None,
    steps: tuple[Tensor, ...] | None = None,
) -> MemoryTrace:
    """The surprise and inner loss of every token; arguments as ``memory_scan``."""
    traces: list[Trace] = []
    gates = Gates(theta, eta, alpha, None)
    if state is not None and len(set(state.phases)) > 1:
        raise ValueError(f"a trace needs all rows at the same place of their chunk, got counts {state.count}")
    _scan(
        q, k, v, gates, weights, miras, chunk_size, state, "chunked", None, None, norm, delta, steps, None, traces
    )  # fmt: skip
    batch, heads = q.shape[0], q.shape[2]
    surprise, loss, after = (
        torch.cat([getattr(t, name) for t in traces], 1).unflatten(0, (batch, heads)).transpose(1, 2)
        for name in ("surprise", "loss", "after")
    )
    return MemoryTrace(surprise, loss, after, _mean(theta), eta, None if alpha is None else _mean(alpha))


def _mean(gate: Gate) -> Tensor:
    """[B, T, H] of channel gates: the mean over all channels of all maps."""
    return torch.cat(gate, -1).mean(-1) if isinstance(gate, tuple) else gate


def memory_read(
    q: Tensor,
    *,
    weights: tuple[Tensor, ...],
    miras: MirasConfig,
    state: MemoryState | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Read q [B, T, H, D] from the memory as it stands after the last token of ``state``; nothing is written."""
    batch, _, heads, width = q.shape
    _check_weights(weights, miras, heads, width)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        rule = _bind(weights, miras, norm, None, 1, batch, dtype)
        start = _start(
            weights, dtype, state, batch, heads, state.chunk_size if state else 1, bool(state and state.momentum)
        )
        read = read_open(rule, _rows(q, dtype), start)
    return read.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype)


def memory_start(
    batch: int,
    *,
    weights: tuple[Tensor, ...],
    miras: MirasConfig,
    chunk_size: int,
    state: MemoryState | None = None,
    dtype: torch.dtype = torch.float32,
) -> MemoryState:
    """``state`` with nothing left implicit: A_0 and S = 0 stand in it for the rows that begin a stream."""
    heads, momentum = weights[0].shape[0], miras.algorithm.momentum
    dtype = torch.promote_types(dtype, torch.float32)
    flat = _start(weights, dtype, state, batch, heads, chunk_size, momentum)
    return replace(flat.map(lambda x: x.unflatten(0, (batch, heads))), count=flat.count[::heads])


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: tuple[Tensor, ...],
    miras: MirasConfig,
    chunk_size: int,
    state: MemoryState | None,
    engine: Engine,
    mask: Tensor | None,
    store_mask: Tensor | None,
    norm: Norm | None,
    delta: Tensor | None,
    steps: tuple[Tensor, ...] | None,
    lengths: Sequence[int] | None,
    traces: list[Trace] | None = None,
) -> tuple[Tensor, MemoryState]:
    _check(q, k, v, gates, delta, miras, chunk_size, mask, store_mask, lengths)
    batch, tokens, heads, width = q.shape
    _check_weights(weights, miras, heads, width)
    _check_steps(steps, miras, heads, len(weights))
    if state is not None:
        _check_state(state, weights, batch, chunk_size, gates.eta is not None)
    order = None
    if mask is not None and not bool(mask.all()):
        order, lengths = compact(mask)
        q, k, v = (take(x, order) for x in (q, k, v))
        delta = None if delta is None else take(delta, order)
        gates = gates.map(lambda g: take(g, order))
        store_mask = None if store_mask is None else take(store_mask, order)
    if lengths is not None and all(n == tokens for n in lengths):
        lengths = None
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        rule = _bind(weights, miras, norm, steps, chunk_size, batch, dtype)
        start = _start(weights, dtype, state, batch, heads, chunk_size, gates.eta is not None)
        flat = gates.map(lambda g: _rows(g, dtype))
        if store_mask is not None:
            flat = flat.where(store_mask.repeat_interleave(heads, 0))
        repeated = None if lengths is None else tuple(n for n in lengths for _ in range(heads))
        threshold = None
        if delta is not None:
            threshold = _rows(delta if delta.dim() == 4 else delta.unsqueeze(-1), dtype)
        queries, keys, values = (_rows(x, dtype) for x in (q, k, v))
        if engine == "reference":
            y, end = reference_scan(rule, queries, keys, values, threshold, flat, start, repeated)
        else:
            compiled = engine == "compiled"
            y, end = chunked_scan(rule, queries, keys, values, threshold, flat, start, repeated, traces, compiled)
    y = y.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype)
    if order is not None and mask is not None:
        y = restore(y, order, mask)
    end = end.map(lambda x: x.unflatten(0, (batch, heads)))
    return y, replace(end, count=end.count[::heads])


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] -> [B·H, T, ...]."""
    return x.to(dtype).transpose(1, 2).flatten(0, 1)


def _bind(
    weights: tuple[Tensor, ...],
    miras: MirasConfig,
    norm: Norm | None,
    steps: tuple[Tensor, ...] | None,
    chunk_size: int,
    batch: int,
    dtype: torch.dtype,
) -> Rule:
    """The rule with its slow parameters expanded to every sample."""
    anchors = gain = bias = learned = None
    if not miras.retention.identity:
        anchors = tuple(_expand(miras.retention.anchor(w.to(dtype)), batch) for w in weights)
    if miras.architecture.residual_norm:
        if norm is None:
            # The last map's outputs are the memory's.
            heads, width = weights[-1].shape[:2]
            norm = weights[0].new_ones(heads, width), weights[0].new_zeros(heads, width)
        gain, bias = (_expand(x.to(dtype), batch).unsqueeze(1) for x in norm)
    if miras.algorithm.per_chunk:
        # The engines sum θ over a chunk; the mean is that over C.
        learned = tuple(_expand(s.to(dtype) / chunk_size, batch).unsqueeze(-1) for s in steps or default_steps(weights))
    return Rule(miras, anchors, gain, bias, learned)


def default_steps(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Starting steps of muon per map and head: a tenth of ‖A_0‖_F / √min(out, in), [H] each."""
    norms = (torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights)
    return tuple(0.1 * n / min(w.shape[1:]) ** 0.5 for n, w in zip(norms, weights, strict=True))


def _expand(x: Tensor, batch: int) -> Tensor:
    """[H, ...] -> [B·H, ...]."""
    return x.expand(batch, *x.shape).flatten(0, 1)


def _start(
    weights: tuple[Tensor, ...],
    dtype: torch.dtype,
    state: MemoryState | None,
    batch: int,
    heads: int,
    chunk_size: int,
    momentum: bool,
) -> MemoryState:
    """The state to go on from in the engines' layout, with A_0 = ``weights`` and S = 0 filled in for fresh rows."""
    count = (0,) * (batch * heads) if state is None else tuple(n for n in state.count for _ in range(heads))
    if state is not None and not any(state.phases):
        state = replace(state, chunk=None)  # rows picked from a ragged batch bring along its empty columns
    flat = None if state is None else replace(state.map(lambda x: x.to(dtype).flatten(0, 1)), count=count)
    if flat is not None and 0 not in count:
        return flat
    initial = tuple(_expand(w.to(dtype), batch) for w in weights)
    zeros = tuple(torch.zeros_like(w) for w in initial) if momentum else ()
    if flat is None or not any(count):
        return MemoryState(initial, zeros, None, count, chunk_size)
    fresh = torch.tensor([n == 0 for n in count], device=initial[0].device)
    return replace(
        flat, weights=where_rows(fresh, initial, flat.weights), momentum=where_rows(fresh, zeros, flat.momentum)
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    delta: Tensor | None,
    miras: MirasConfig,
    chunk_size: int,
    mask: Tensor | None,
    store_mask: Tensor | None,
    lengths: Sequence[int] | None,
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be a non-empty [B, T, H, D], got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, got {list(x.shape)}")
    for name, x in (("theta", gates.theta), ("eta", gates.eta), ("alpha", gates.alpha)):
        if x is not None or name == "theta":
            _check_gate(name, x, q, miras)  # type: ignore[arg-type]
    if gates.eta is not None and not miras.algorithm.momentum:
        raise ValueError(f"eta must be None with algorithm {miras.algorithm.name!r}, which has no momentum")
    if gates.eta is None and miras.algorithm.per_chunk:
        raise ValueError(f"eta must be given with algorithm {miras.algorithm.name!r}, which writes its momentum")
    if (delta is not None) != miras.bias.learned_delta:
        raise ValueError(
            f"delta must {'be given' if delta is None else 'be None'} with bias {miras.bias!r}, whose threshold is "
            f"{'learned' if delta is None else 'not learned'}"
        )
    if delta is not None and not isinstance(delta, Tensor):
        raise ValueError(f"delta must be a tensor, got {type(delta).__name__}")
    if delta is not None and delta.shape not in (q.shape[:3], q.shape):
        raise ValueError(f"delta must be {list(q.shape[:3])} or {list(q.shape)}, got {list(delta.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for name, x in (("mask", mask), ("store_mask", store_mask)):
        if x is not None and (x.dtype != torch.bool or x.shape != q.shape[:2]):
            raise ValueError(f"{name} must be bool [B, T] = {list(q.shape[:2])}, got {x.dtype} {list(x.shape)}")
    if lengths is not None and (
        mask is not None or len(lengths) != q.shape[0] or not all(0 <= n <= q.shape[1] for n in lengths)
    ):
        raise ValueError(f"lengths must give 0..T tokens for each of {q.shape[0]} rows, without a mask, got {lengths}")


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


def _check_steps(steps: tuple[Tensor, ...] | None, miras: MirasConfig, heads: int, maps: int) -> None:
    if steps is None:
        return
    if not miras.algorithm.per_chunk:
        raise ValueError(f"steps must be None with algorithm {miras.algorithm.name!r}: they belong to muon")
    if not isinstance(steps, tuple):
        raise ValueError(f"steps must be a tuple of tensors, got {type(steps).__name__}")
    if (found := [list(s.shape) for s in steps]) != [[heads]] * maps:
        raise ValueError(f"steps must be one [H] = [{heads}] for each of {maps} maps, got {found}")


def _check_weights(weights: tuple[Tensor, ...], miras: MirasConfig, heads: int, width: int) -> None:
    wanted = [[heads, *shape] for shape in miras.architecture.shapes(width)]
    found = [list(w.shape) for w in weights]
    if found != wanted:
        raise ValueError(f"weights must have shapes {wanted} for {miras.architecture!r}, got {found}")


def _check_state(state: MemoryState, weights: tuple[Tensor, ...], batch: int, chunk_size: int, momentum: bool) -> None:
    if not isinstance(state, MemoryState):
        raise ValueError(f"state must be a MemoryState, got {type(state).__name__}")
    if state.chunk_size != chunk_size:
        raise ValueError(f"state was made with chunk_size {state.chunk_size}, this memory has {chunk_size}")
    wanted = [[batch, *w.shape] for w in weights]
    if (found := [list(w.shape) for w in state.weights]) != wanted:
        raise ValueError(f"state has weights of shapes {found}, this memory and batch need {wanted}")
    if bool(state.momentum) != momentum:
        raise ValueError(
            f"state {'has' if state.momentum else 'lacks'} momentum, this memory {'has' if momentum else 'lacks'} it"
        )
