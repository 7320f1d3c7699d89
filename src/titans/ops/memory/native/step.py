"""One token of every row in C++, into the buffers of a `StepMemory`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.native.build import library
from titans.ops.memory.native.native import ACTIVATIONS
from titans.ops.memory.state import StepMemory
from titans.ops.memory.tokens import Tokens


def step_rows(rule: ChunkRule, tokens: Tokens, state: StepMemory, column: Tensor, active: Tensor | None) -> Tensor:
    """Write one token per row and read it, as a token does that is not its chunk's last.

    Args:
        rule: whose gain and bias are [H, D].
        tokens: q, k, v [B, H, D] and gates [B, H] of one token, in the buffers' dtype, float32 or float64.
        state: contiguous buffers; ``tokens``, ``kernel``, ``push`` and ``retained`` are written into.
        column: the token's column, int64 [B].
        active: bool [B], False for rows that take no token, whose output is 0.

    Returns:
        y [B, H, D].
    """
    batch, heads, size, numbers = state.tokens.shape
    width, hidden = tokens.q.shape[-1], state.weights[-1].shape[-1]
    gates, y = tokens.gates, torch.empty_like(tokens.q, memory_format=torch.contiguous_format)
    maps = [*([None] if rule.activation is None else []), *state.weights]
    pasts = [*([None] if rule.activation is None else []), *state.momentum] if state.momentum else [None, None]
    read = (tokens.q, tokens.k, tokens.v, gates.theta, gates.eta, gates.alpha, rule.gain, rule.bias, *maps, *pasts)
    kept = [None if x is None else x.contiguous() for x in (*read, column, active)]  # type: ignore[union-attr]
    places = (*kept[:12], state.tokens, state.kernel, state.push, state.retained, y, *kept[12:])
    shape = (batch, heads, size, numbers, width, hidden, ACTIVATIONS.index(rule.activation), int(rule.pulls))
    shape = (*shape, int(rule.gain is not None), int(bool(state.momentum)), state.kernel.shape[2])
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    pointers = (ctypes.c_void_p * len(places))(*(None if x is None else x.data_ptr() for x in places))
    if library().titans_step(sizes, pointers, y.dtype == torch.float64, torch.get_num_threads()):
        raise RuntimeError("the native engine got no memory for its scratch space")
    return y
