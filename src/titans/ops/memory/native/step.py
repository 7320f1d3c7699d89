"""One token of every row through a memory layer, between its projections, in C++; and a read at given weights."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.native.build import library
from titans.ops.memory.native.native import ACTIVATIONS
from titans.ops.memory.native.vectors import check, pack
from titans.ops.memory.state import StepMemory


@dataclass(frozen=True)
class StepToken:
    """What a layer makes of one token x [B, 1, d_model] before the memory sees it, d = d_model.

    Attributes:
        projected: q, k and v before the convolution, [B, 1, 3 d].
        tail, conv: the convolution's last inputs [B, K-1, 3 d] and its weights [K, 3 d]; None without one.
        logits: of θ, η and α as far as there are such, [B, 1, H] each, side by side; None for a read.
        gate: the logits of the output's gate, [B, 1, d]; None for a read.
    """

    projected: Tensor
    tail: Tensor | None
    conv: Tensor | None
    logits: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class StepSettings:
    """The layer's constants: cap of θ, SiLU after the convolution, scale [d] and eps of the output's norm."""

    theta_max: float
    silu: bool
    scale: Tensor
    eps: float


def step_rows(
    rule: ChunkRule, token: StepToken, settings: StepSettings, state: StepMemory, column: Tensor, active: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Write one token per row and read it, as a token does that is not its chunk's last.

    Args:
        rule: whose gain and bias are [H, D].
        token, settings: of the layer, in the buffers' dtype, float32 or float64.
        state: contiguous buffers; ``tokens``, ``kernel``, ``push`` and ``retained`` are written into.
        column: the token's column, int64 [B, 1].
        active: bool [B], False for rows that take no token, whose read is 0.

    Returns:
        q and y [B, H, D]; y normalised and gated, [B, 1, d]; the convolution's new tail.
    """
    batch, heads, size, numbers = state.tokens.shape
    hidden, width = state.weights[-1].shape[-1], state.weights[-1].shape[-2]
    assert token.gate is not None
    q = token.gate.new_empty(batch, heads, width)
    y, out = torch.empty_like(q), torch.empty_like(token.gate, memory_format=torch.contiguous_format)
    tail = None if token.tail is None else torch.empty_like(token.tail, memory_format=torch.contiguous_format)
    none = [None] if rule.activation is None else []
    maps, pasts = (*none, *state.weights), (*none, *state.momentum) if state.momentum else (None, None)
    given = (token.projected, token.tail, token.conv, token.logits, token.gate, settings.scale, rule.gain, rule.bias)
    kept = [None if x is None else x.contiguous() for x in (*given, *maps, *pasts, column, active)]
    written = (state.tokens, state.kernel, state.push, state.retained, q, y, out, tail)
    places = (*kept[:12], *written, *kept[12:])
    shape = (
        *(batch, heads, size, numbers, width, hidden, ACTIVATIONS.index(rule.activation), rule.pulls),
        *(rule.gain is not None, bool(state.momentum), state.kernel.shape[2]),
        *(1 if token.conv is None else len(token.conv), settings.silu, state.retained is not None),
    )
    _call(shape, settings, places, reads=False)
    return q, y, out, tail


def recall_rows(
    rule: ChunkRule, token: StepToken, settings: StepSettings, weights: tuple[Tensor, ...], active: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Read a vector per row at the weights W = φ(A), and normalise what is found.

    Args:
        rule: as in `step_rows`.
        token: ``projected`` [B, 1, d] is the query alone, ``tail`` and ``conv`` are as wide; neither logits nor gate.
        settings: the norm's ``scale`` and ``eps`` are those of what is found.
        weights: [B, H, out, in] per map.
        active: bool [B], False for rows whose convolution sees no token.

    Returns:
        [B, 1, d], and the convolution's new tail.
    """
    batch, heads, width, hidden = weights[-1].shape
    out = torch.empty_like(token.projected, memory_format=torch.contiguous_format)
    tail = None if token.tail is None else torch.empty_like(token.tail, memory_format=torch.contiguous_format)
    maps = weights if rule.activation else (None, *weights)
    given = (token.projected, token.tail, token.conv, None, None, settings.scale, rule.gain, rule.bias, *maps, active)
    *kept, active = (None if x is None else x.contiguous() for x in given)
    places = (*kept, *[None] * 8, out, tail, None, active)
    shape = (
        *(batch, heads, 0, 0, width, hidden, ACTIVATIONS.index(rule.activation), 0, rule.gain is not None, 0, 0),
        *(1 if token.conv is None else len(token.conv), settings.silu, 0),
    )
    _call(shape, settings, places, reads=True)
    return out, tail


def _call(shape: tuple[int, ...], settings: StepSettings, places: tuple[Tensor | None, ...], reads: bool) -> None:
    sizes, pointers = pack(shape, places)
    floats = (ctypes.c_double * 2)(settings.theta_max, settings.eps)
    double = settings.scale.dtype == torch.float64
    check(library().titans_step(sizes, floats, pointers, double, reads, torch.get_num_threads()))
