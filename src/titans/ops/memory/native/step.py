"""One token of every row through a memory layer, between its projections, in C++."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.native.build import library
from titans.ops.memory.native.native import ACTIVATIONS
from titans.ops.memory.state import StepMemory


@dataclass(frozen=True)
class StepToken:
    """What a layer makes of one token x [B, 1, d_model] before the memory sees it, d = d_model.

    Attributes:
        projected: q, k and v before the convolution, [B, 1, 3 d].
        logits: of θ, η and α as far as there are such, [B, 1, H] each, side by side.
        gate: the logits of the output's gate, [B, 1, d].
        tail, conv: the convolution's last inputs [B, K-1, 3 d] and its weights [K, 3 d]; None without one.
    """

    projected: Tensor
    logits: Tensor
    gate: Tensor
    tail: Tensor | None
    conv: Tensor | None


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
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    floats = (ctypes.c_double * 2)(settings.theta_max, settings.eps)
    pointers = (ctypes.c_void_p * len(places))(*(None if x is None else x.data_ptr() for x in places))
    if library().titans_step(sizes, floats, pointers, q.dtype == torch.float64, torch.get_num_threads()):
        raise RuntimeError("the native engine got no memory for its scratch space")
    return q, y, out, tail
