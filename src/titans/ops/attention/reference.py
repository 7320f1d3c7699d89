"""Attention, one query at a time: what the fast forms are tested against.

Legend: B batch, T new tokens, S = offset + T key columns (cached ones first), H heads, D head width, P persistent keys.
"""

import torch
from torch import Tensor

Persistent = tuple[Tensor, Tensor, Tensor]
"""``(q_p, k_p, v_p)``: unrotated queries [B, T, H, D], and always-visible keys and values [B or 1, P, H, D]."""


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    persistent: Persistent | None,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
) -> None:
    """Raise a ValueError that names the first argument whose shape does not fit the others."""
    if q.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q must be [B, T, H, D] with T >= 1, got {list(q.shape)}")
    B, T, H, D = q.shape
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (B, H, D) or k.shape[1] < T:
        raise ValueError(f"k must be [{B}, S >= {T}, {H}, {D}] to fit q, got {list(k.shape)}")
    _check_same("v", v, "k", k)
    if memory is not None:
        _check_same("memory_k", memory[0], "k", k)
        _check_same("memory_v", memory[1], "k", k)
    if window is not None and not isinstance(window, int):
        raise ValueError(f"window must be an integer, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if start is not None and start.shape not in ((B,), (B, T)):
        raise ValueError(
            f"start must be [{B}] or [{B}, {T}], one first valid column per row or query, got {list(start.shape)}"
        )
    if persistent is not None:
        q_p, k_p, v_p = persistent
        _check_same("persistent q_p", q_p, "q", q)
        if k_p.ndim != 4 or k_p.shape[0] not in (1, B) or k_p.shape[2:] != (H, D):
            raise ValueError(f"persistent k_p must be [{B} or 1, P, {H}, {D}] to fit q, got {list(k_p.shape)}")
        _check_same("persistent v_p", v_p, "k_p", k_p)


def _check_same(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {list(like.shape)}, got {list(value.shape)}")


def reference_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, start: Tensor | None = None, persistent: Persistent | None = None
) -> Tensor:
    """The definition of :func:`titans.ops.attention.causal_attention`, with the same arguments."""
    check_arguments(q, k, v, start, persistent)
    return _attend_by_query(q, [(k, v)], k.shape[1], start, persistent)


def reference_sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, start: Tensor | None = None, persistent: Persistent | None = None
) -> Tensor:
    """The definition of :func:`titans.ops.attention.sliding_window_attention`, with the same arguments."""
    check_arguments(q, k, v, start, persistent, window=window)
    return _attend_by_query(q, [(k, v)], window, start, persistent)


def reference_segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    start: Tensor | None = None,
    persistent: Persistent | None = None,
) -> Tensor:
    """The definition of :func:`titans.ops.attention.segment_attention`, with the same arguments."""
    check_arguments(q, k, v, start, persistent, memory=(memory_k, memory_v))
    return _attend_by_query(q, [(memory_k, memory_v), (k, v)], k.shape[1], start, persistent)


def _attend_by_query(
    q: Tensor,
    sources: list[tuple[Tensor, Tensor]],
    window: int,
    start: Tensor | None,
    persistent: Persistent | None,
) -> Tensor:
    """Each query attends to the columns in its reach of every source, and to all persistent keys, in one softmax."""
    B, T, _, D = q.shape
    offset = sources[0][0].shape[1] - T
    rows = []
    for b in range(B):
        outputs = []
        for j in range(T):
            first_valid = 0 if start is None else int(start[b] if start.dim() == 1 else start[b, j])
            reach = slice(max(first_valid, offset + j - window + 1), offset + j + 1)
            scores = [torch.einsum("hd,shd->hs", q[b, j], k[b, reach]) for k, _ in sources]
            values = [v[b, reach] for _, v in sources]
            if persistent is not None:
                q_p, k_p, v_p = persistent
                scores.append(torch.einsum("hd,shd->hs", q_p[b, j], k_p.expand(B, -1, -1, -1)[b]))
                values.append(v_p.expand(B, -1, -1, -1)[b])
            weights = (torch.cat(scores, dim=1) / D**0.5).softmax(dim=1)
            outputs.append(torch.einsum("hs,shd->hd", weights, torch.cat(values)))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)
