"""Multi-head attention with a short convolution, rotary positions, persistent tokens and a cache of bounded size.

Legend: B batch, T tokens, H heads, D head width, P persistent tokens, w cached tokens (at most window - 1), K kernel of
the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from titans.layers.convolution import ShortConvolution, start_keys_one_token_behind
from titans.layers.module import Linear, Module
from titans.ops.attention import apply_rotary, causal_attention, rotary_angles, sliding_window_attention
from titans.ops.memory.native import around
from titans.ops.rows import Rows, columns
from titans.state import State

# How much larger queries and keys start where the keys stand one token behind. In heads of 64 a key that fits a query
# in all its tokens then scores 18, and e to the half of it, which is what the rotation leaves over a distance,
# outweighs thousands of others. At 1 a Transformer takes five times as many steps to find what it copies from a text of
# 2,048 bytes (docs/results/evidence.md).
SHARP = 3.0


@dataclass(frozen=True)
class AttentionCache(State):
    """Rotated keys and values of the tokens still in reach, [B, w, H, D], right-aligned per row."""

    columns: ClassVar[int | None] = 1

    keys: Tensor
    values: Tensor

    def then(self, new: AttentionCache) -> AttentionCache:
        """These columns followed by new ones, in the new ones' dtype."""
        pairs = (self.keys, new.keys), (self.values, new.values)
        return AttentionCache(*(torch.cat((old.to(x.dtype), x), 1) for old, x in pairs))

    def last(self, ends: Sequence[int], width: int) -> AttentionCache:
        """The ``width`` columns before column ``ends[b]`` of every row."""
        start = [end - width for end in ends]
        return AttentionCache(columns(self.keys, start, width), columns(self.values, start, width))


@dataclass(frozen=True)
class AttentionState(State):
    """The cache, and the last inputs of the convolution [B, K-1, 3·d_model] (None without one)."""

    cache: AttentionCache
    tail: Tensor | None


@dataclass(frozen=True)
class AttentionStart:
    """How attention begins: ``induction`` and ``itself`` as `Attention` has them."""

    induction: bool = True
    itself: int | None = None


class Attention(Module):
    """Projections of causal or sliding-window attention.

    Queries, keys and values may pass through a short causal convolution before they are rotated, as the memory's do
    (Titans §4.4): persistent keys pass it by.

    Args:
        d_model: width of x.
        n_heads: divides d_model.
        window: reach of a query, itself included; None: everything before it.
        rope_base: base of the rotary angles.
        gain: of the output projection at the start.
        conv_kernel: kernel of the convolution; 0 for none.
        induction: the key of a token starts as the query of the one before it, see `start_keys_one_token_behind`.
        itself: None, or a number of tokens: keys then start like queries, so that a token attends to itself about as
            much as to that many others: its score for itself is about ln(itself), or √D where that is less. Untrained
            attention averages, and tokens then hardly differ after it: where a memory writes what attention found, all
            of it adds up in the same place; where attention reads what a memory found, little of it is left. Not used
            where ``induction`` is.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        window: int | None = None,
        rope_base: float = 10_000.0,
        gain: float = 1.0,
        conv_kernel: int = 0,
        start: AttentionStart = AttentionStart(),
    ):
        super().__init__()
        self.n_heads, self.window, self.rope_base, self.start = n_heads, window, rope_base, start
        self.head_dim = d_model // n_heads
        self.q = Linear(d_model, d_model)
        self.kv = Linear(d_model, 2 * d_model)
        self.conv = ShortConvolution(3 * d_model, conv_kernel) if conv_kernel else None
        self.out = Linear(d_model, d_model, gain=gain)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        keys, _ = self.kv.weight.chunk(2)
        if self.start.induction and start_keys_one_token_behind(self.q.weight, keys, self.conv):
            self.q.weight.mul_(SHARP)
            keys.mul_(SHARP)
            return
        if (itself := self.start.itself) is not None:
            keys.copy_(self.q.weight * min(1, math.log(max(2, itself)) / self.head_dim**0.5))

    def project(self, x: Tensor, tail: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[B, T, d_model] -> queries, keys (neither rotated) and values, each [B, T, H, D], and the convolution's new
        tail; ``tail`` is that of an earlier call."""
        if self.conv is None:
            return self._heads(self.q(x)), *self.keys_values(x), None
        projected = torch.cat((self.q(x), self.kv(x)), -1)
        found = self.conv.heads(projected, tail, rows, (around.PLAIN,) * 3, self.head_dim)
        if found is not None:
            return found  # type: ignore[return-value]
        projected, tail = self.conv(projected, tail, rows)
        queries, keys, values = map(self._heads, projected.chunk(3, -1))
        return queries, keys, values, tail

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, d_model] that are no tokens of the stream -> keys (not rotated) and values, each [B, n, H, D]; the
        convolution is passed by."""
        keys, values = self.heads(self.kv(x))
        return keys, values

    def heads(self, projected: Tensor) -> list[Tensor]:
        """Keys and values side by side [B, n, 2·d_model] -> each [B, n, H, D]."""
        return [self._heads(part) for part in projected.chunk(2, -1)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def angles(self, rows: Rows, x: Tensor, modulo: int | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the columns' positions, in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotary_angles(rows.positions(x.device, modulo), self.head_dim, self.rope_base, dtype)

    def forward(
        self, x: Tensor, state: AttentionState | None, rows: Rows, persistent: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend from x to persistent tokens, the state's cache and x itself.

        Args:
            x: [B, T, d_model] of a right-padded batch.
            state: what an earlier call returned; None: all streams begin here.
            rows: where the rows stand.
            persistent: [B or 1, P, d_model], visible to every query; as keys they are not rotated.

        Returns:
            [B, T, d_model], and the state for the next call.
        """
        plain, keys, values, tail = self.project(x, None if state is None else state.tail, rows)
        angles = self.angles(rows, plain)
        q, new = apply_rotary(plain, *angles), AttentionCache(apply_rotary(keys, *angles), values)
        reach = new if state is None else state.cache.then(new)
        cached = reach.keys.shape[1] - x.shape[1]
        always = None if persistent is None else (plain, *self.keys_values(persistent))
        start = first_columns(rows, cached, x.device)
        if self.window is None:
            y = causal_attention(q, reach.keys, reach.values, start=start, persistent=always)
        else:
            y = sliding_window_attention(q, reach.keys, reach.values, self.window, start=start, persistent=always)
        width = min(max(rows.after), reach.keys.shape[1], (self.window or math.inf) - 1)
        cache = reach.last([cached + n for n in rows.counts], int(width))
        return self.out(y.flatten(2)), AttentionState(cache, tail)


def first_columns(rows: Rows, cached: int, device: torch.device) -> Tensor | None:
    """First visible column, of ``cached`` right-aligned ones and then the call's own: per row [B], or with further
    documents per query [B, T]; None where all are visible."""
    first = None
    if any(n < cached for n in rows.seen):
        first = torch.tensor([max(cached - n, 0) for n in rows.seen], device=device)
    if not rows.starts:
        return first
    own = rows.document_starts(device)
    past = torch.zeros((), dtype=torch.int64, device=device) if first is None else first.unsqueeze(1)
    return torch.where(own > 0, cached + own, past)
