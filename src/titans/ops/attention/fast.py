"""Attention through PyTorch's scaled_dot_product_attention (SDPA).

Legend: B batch, T new tokens, S = offset + T key columns (cached ones first), H heads, D head width, P persistent keys.
Cached columns are right-aligned: those of row b before ``start[b] <= offset`` are empty. Every query sees its own
column, so no softmax is ever empty, in padded rows neither.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops.attention.reference import Persistent, check_arguments


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, start: Tensor | None = None, persistent: Persistent | None = None
) -> Tensor:
    """Attend to every valid column up to the query's own.

    Query j sits at column ``offset + j`` with ``offset = S - T`` and sees column c when
    ``start[b] <= c <= offset + j``.

    Args:
        q: Rotated queries of the new tokens, [B, T, H, D], T >= 1.
        k: Rotated keys, [B, S, H, D], S >= T: cached columns first, then the new tokens.
        v: Values, [B, S, H, D].
        start: First valid column per row, int64 [B], 0 <= start <= offset, or per query, [B, T], not beyond its own
            column. None: all columns are valid.
        persistent: ``(q_p, k_p, v_p)``: unrotated queries [B, T, H, D] that score the always-visible keys and values
            [B or 1, P, H, D]; they share the softmax. None: no persistent keys.

    Returns:
        [B, T, H, D].

    Raises:
        ValueError: A shape does not fit.

    Source: Titans §2 (softmax attention); the baseline Transformer's mixer.
    """
    check_arguments(q, k, v, start, persistent)
    T, S = q.shape[1], k.shape[1]
    if T == S and (start is None or start.dim() == 1):
        return _attend(q, k, v, None, persistent, causal=T > 1)
    return _attend(q, k, v, _visible(T, S, start, q.device), persistent)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, start: Tensor | None = None, persistent: Persistent | None = None
) -> Tensor:
    """Attend to the last ``window`` valid columns, the query's own included, in time and memory O(T * window).

    Query j sits at column ``offset + j`` with ``offset = S - T`` and sees column c when
    ``max(start[b], offset + j - window + 1) <= c <= offset + j``.

    Args:
        q: Rotated queries of the new tokens, [B, T, H, D], T >= 1.
        k: Rotated keys, [B, S, H, D], S >= T: cached columns first, then the new tokens.
        v: Values, [B, S, H, D].
        window: Columns in reach, >= 1; 1 is the query's own column alone.
        start: First valid column per row, int64 [B], 0 <= start <= offset, or per query, [B, T], not beyond its own
            column. None: all columns are valid.
        persistent: ``(q_p, k_p, v_p)``: unrotated queries [B, T, H, D] that score the keys and values
            [B or 1, P, H, D], visible whatever the window; they share the softmax. None: no persistent keys.

    Returns:
        [B, T, H, D].

    Raises:
        ValueError: A shape does not fit, or window < 1.

    Source: Titans §4.2, Eqs. 26-28 (MAG) and §4.3, Eqs. 29-31 (MAL).
    """
    check_arguments(q, k, v, start, persistent, window=window)
    T, S = q.shape[1], k.shape[1]
    if window >= S:
        return causal_attention(q, k, v, start=start, persistent=persistent)
    in_reach = min(S, T + window - 1)
    k, v = k[:, S - in_reach :], v[:, S - in_reach :]
    if start is not None:
        start = (start - (S - in_reach)).clamp(min=0)
    if 2 * window >= T:
        return _attend(q, k, v, _visible(T, in_reach, start, q.device, window), persistent)
    head = in_reach - T + window
    head_persistent = None if persistent is None else (persistent[0][:, :window], *persistent[1:])
    per_query = start is not None and start.dim() == 2
    first = sliding_window_attention(
        q[:, :window], k[:, :head], v[:, :head], window,
        start=start[:, :window] if per_query and start is not None else start, persistent=head_persistent,
    )  # fmt: skip
    own = (start - (in_reach - T)).clamp(min=0) if per_query and start is not None else None
    rest = _attend_after_first_window(q, k[:, -T:], v[:, -T:], window, own, persistent)
    return torch.cat([first, rest], dim=1)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    start: Tensor | None = None,
    persistent: Persistent | None = None,
) -> Tensor:
    """Attend inside one MAC segment to tokens and to the memory's reads for them, both causally.

    Query j sits at column ``offset + j`` with ``offset = S - T`` and sees token column c and memory column c when
    ``start[b] <= c <= offset + j``.

    Args:
        q: Rotated queries of the new tokens, [B, T, H, D], T >= 1.
        k: Rotated keys of the segment, [B, S, H, D], S >= T: cached columns first, then the new tokens.
        v: Values, [B, S, H, D].
        memory_k: Keys of the memory's read for each column, rotated like that column's token, [B, S, H, D].
        memory_v: Values of the memory's reads, [B, S, H, D].
        start: First valid column per row, int64 [B], 0 <= start <= offset, or per query, [B, T], not beyond its own
            column. None: all columns are valid.
        persistent: ``(q_p, k_p, v_p)``: unrotated queries [B, T, H, D] that score the always-visible keys and values
            [B or 1, P, H, D]; they share the softmax. None: no persistent keys.

    Returns:
        [B, T, H, D].

    Raises:
        ValueError: A shape does not fit.

    Source: Titans §4.1, Eqs. 21-25 (MAC), with the memory columns causal as well.
    """
    check_arguments(q, k, v, start, persistent, memory=(memory_k, memory_v))
    visible = _visible(q.shape[1], k.shape[1], start, q.device)
    if visible is not None:
        visible = torch.cat([visible, visible], dim=-1)
    return _attend(q, torch.cat([memory_k, k], dim=1), torch.cat([memory_v, v], dim=1), visible, persistent)


def _visible(T: int, S: int, start: Tensor | None, device: torch.device, window: int | None = None) -> Tensor | None:
    """Boolean mask broadcastable to [B, H, T, S]; None where a single query sees all."""
    columns = torch.arange(S, device=device)
    valid = None
    if start is not None and (S > T or start.dim() == 2):
        valid = columns >= (start[:, None, None, None] if start.dim() == 1 else start[:, None, :, None])
    if T == 1 and (window is None or window >= S):
        return valid
    positions = columns[S - T :, None]
    visible = columns <= positions
    if window is not None:
        visible = visible & (columns > positions - window)
    return visible if valid is None else visible & valid


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, persistent: Persistent | None, causal: bool = False
) -> Tensor:
    """One SDPA call over persistent and other keys. ``causal`` (T = S) replaces a mask, so that no [T, S] is built."""
    T, D = q.shape[1], q.shape[3]
    if persistent is not None:
        P = persistent[1].shape[1]
        q, k, v = _join_persistent(q, k, v, persistent)
        if visible is not None:
            visible = F.pad(visible, (P, 0), value=True)
        if causal:  # P idle queries in front align the diagonal, so the persistent columns stay visible
            q = F.pad(q, (0, 0, 0, 0, P, 0))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, is_causal=causal, scale=D**-0.5
    )
    return out.transpose(1, 2)[:, -T:, :, :D]


def _join_persistent(q: Tensor, k: Tensor, v: Tensor, persistent: Persistent) -> tuple[Tensor, Tensor, Tensor]:
    """Put the persistent keys in front of ``k`` although other queries score them.

    Their P scores become P more query features, which a persistent key picks with a one-hot vector and every other key
    ignores. Values are padded to the same width: without that SDPA leaves its fused CPU kernel.
    """
    q_p, k_p, v_p = persistent
    B, _, H, D = q.shape
    P = k_p.shape[1]
    q = torch.cat([q, torch.einsum("bthd,bphd->bthp", q_p, k_p.expand(B, -1, -1, -1))], dim=-1)
    one_hot = F.pad(torch.eye(P, dtype=k.dtype, device=k.device), (D, 0))
    k = torch.cat([one_hot[None, :, None].expand(B, -1, H, -1), F.pad(k, (0, P))], dim=1)
    v = F.pad(torch.cat([v_p.expand(B, -1, -1, -1), v], dim=1), (0, P))
    return q, k, v


def _attend_after_first_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, persistent: Persistent | None
) -> Tensor:
    """Queries from number ``window`` on, T = S: blocks of ``window`` queries against their own and the previous block.

    None of them reaches a cached column, so all blocks of all rows share one [window, 2 * window] mask, unless
    ``start`` [B, T] gives every query a first column of its own.
    """
    B, T = q.shape[:2]
    blocks = -(-T // window) - 1

    def split(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, (blocks + 1) * window - T)).unflatten(1, (blocks + 1, window))

    def own(x: Tensor) -> Tensor:
        return split(x)[:, 1:].flatten(0, 1)

    def previous_and_own(x: Tensor) -> Tensor:
        x = split(x)
        return torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1)

    def repeat(x: Tensor) -> Tensor:
        return x[:, None].expand(B, blocks, -1, -1, -1).flatten(0, 1)

    if persistent is not None:
        q_p, k_p, v_p = persistent
        persistent = own(q_p), repeat(k_p), repeat(v_p)
    visible = _visible(window, 2 * window, None, q.device, window)
    if start is not None and visible is not None:
        starts = F.pad(start, (0, (blocks + 1) * window - T)).unflatten(1, (blocks + 1, window))[:, 1:]
        before = torch.arange(blocks, device=q.device).view(-1, 1) * window  # first column of a block's previous one
        visible = visible & (
            torch.arange(2 * window, device=q.device) >= (starts - before).flatten(0, 1)[:, None, :, None]
        )
    out = _attend(own(q), previous_and_own(k), previous_and_own(v), visible, persistent)
    return out.unflatten(0, (B, blocks)).flatten(1, 2)[:, : T - window]
