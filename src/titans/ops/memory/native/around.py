"""What lies around the scan when whole texts are read, with gradients, in C++: one pass forward and one backward.

The convolution with the norms of queries, keys and values, the norm of layers and reads with its gate, SwiGLU. Each
does what the layer that calls it spells out in torch operations; `usable` says when it may.

Legend: B batch, T tokens, H heads, D head width, K taps of the convolution, N parts (queries, keys, values).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # type: ignore[import-not-found]

from titans.autograd import hand_written
from titans.ops.memory.native.build import library, unavailable
from titans.ops.memory.native.vectors import pack

PLAIN, UNIT, LIMIT = range(3)
"""What becomes of a head: nothing, unit length, or a length of at most ``longest``."""
GROUPS = 32  # as in around.h: partial sums of a weight's gradient


def usable(*tensors: Tensor | None) -> bool:
    """May C++ take these: ordinary tensors on the CPU, all float32 or all float64; no autocast, graph or transform?"""
    given = [x for x in tensors if x is not None]
    dtype = given[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(type(x) in _ORDINARY and x.device.type == "cpu" and x.dtype == dtype for x in given)
        and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        and not any(map(is_functorch_wrapped_tensor, given))
        and unavailable() is None
    )


_ORDINARY = (Tensor, nn.Parameter)


def heads(
    x: Tensor, tail: Tensor | None, weight: Tensor, kinds: Sequence[int], head_dim: int, longest: float
) -> tuple[Tensor, ...]:
    """Causal convolution, and what becomes of each head of its output.

    Args:
        x: [B, T, N·H·D].
        tail: the K - 1 tokens before, [B, K-1, N·H·D]; None for zeros.
        weight: [K, N·H·D].
        kinds: of the N parts, at most four.
        head_dim: D.
        longest: the length at most of heads of the kind LIMIT.

    Returns:
        the N parts, each [B, T, H, D] (of memory laid out as [B, H, T, D]), and the last K - 1 tokens.
    """
    *parts, after = _Heads.apply(x, tail, weight, tuple(kinds), head_dim, longest)  # type: ignore[misc]
    return *(part.transpose(1, 2) for part in parts), after


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · scale, of x [..., width]."""
    return _Norm.apply(x.reshape(1, 1, -1, len(scale)), scale, None, eps).view(x.shape)  # type: ignore[union-attr]


def gated_norm(x: Tensor, scale: Tensor, eps: float, gate: Tensor) -> Tensor:
    """x / RMS(x) · scale · σ(gate), of x [B, T, H, D], best laid out as [B, H, T, D], and gate [B, T, H·D]."""
    return _Norm.apply(x.transpose(1, 2), scale, gate, eps)  # type: ignore[return-value]


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) ⊙ value of x = [gate, value] [..., 2·hidden] -> [..., hidden]."""
    return _SwiGLU.apply(x)  # type: ignore[return-value]


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tail: Tensor | None, weight: Tensor, kinds: tuple[int, ...], head_dim: int, longest: float
    ) -> tuple[Tensor, ...]:
        x, weight = x.contiguous(), weight.contiguous()
        tail = None if tail is None else tail.contiguous()
        batch, tokens, channels = x.shape
        count = channels // (len(kinds) * head_dim)
        parts = [x.new_empty(batch, count, tokens, head_dim) for _ in kinds]
        after = x.new_empty(batch, len(weight) - 1, channels)
        ctx.sizes = (batch, tokens, len(weight), len(kinds), count, head_dim, *kinds), longest
        _call(0, *ctx.sizes, x, tail, weight, after, None, None, None, *parts)
        ctx.save_for_backward(x, tail, weight)
        ctx.set_materialize_grads(False)
        return *parts, after

    @staticmethod
    @hand_written
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, tail, weight = ctx.saved_tensors
        *d_parts, d_after = (None if g is None else g.contiguous() for g in grads)
        d_x, d_weight = torch.empty_like(x), weight.new_empty(GROUPS, *weight.shape)
        d_tail = None if tail is None else torch.empty_like(tail)
        _call(1, *ctx.sizes, x, tail, weight, d_after, d_x, d_tail, d_weight, *d_parts)
        return d_x, d_tail, d_weight.sum(0), None, None, None


class _Norm(torch.autograd.Function):
    """Of x [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, gate: Tensor | None, eps: float) -> Tensor:  # type: ignore[override]
        x, scale = x.contiguous(), scale.contiguous()
        gate = None if gate is None else gate.contiguous()
        batch, count, tokens, width = x.shape
        out = x.new_empty(batch, tokens, count * width)
        ctx.sizes = (batch, tokens, count, width), eps
        _call(2, *ctx.sizes, x, scale, gate, out)
        ctx.save_for_backward(x, scale, gate)
        return out

    @staticmethod
    @hand_written
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, gate = ctx.saved_tensors
        d_x, d_scale = torch.empty_like(x), scale.new_empty(GROUPS, len(scale))
        d_gate = None if gate is None else torch.empty_like(gate)
        _call(3, *ctx.sizes, x, scale, gate, d_out.contiguous(), d_x, d_scale, d_gate)
        return d_x, d_scale.sum(0), d_gate, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.contiguous()
        hidden = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], hidden)
        _call(4, (out.numel() // hidden, hidden, 0, 0), 0.0, x, None, out)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @hand_written
    def backward(ctx: Any, d_out: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        d_x, hidden = torch.empty_like(x), d_out.shape[-1]
        _call(4, (d_out.numel() // hidden, hidden, 0, 0), 0.0, x, d_out.contiguous(), d_x)
        return d_x


def _call(what: int, sizes: tuple[int, ...], number: float, *tensors: Tensor | None) -> None:
    numbers, places = pack(sizes, tensors)
    double = next(x for x in tensors if x is not None).dtype == torch.float64
    library().titans_around(numbers, number, places, double, what, torch.get_num_threads())
