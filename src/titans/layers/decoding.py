"""Layers one token at a time: states of fixed shapes, and steps whose counts are tensors.

What a layer's call does to a state that grows, these do to buffers that do not: `begin_…` lays a state out in them,
`step_…` reads one token of every row, `end_…` makes a state of them again. A step is a pure function of tensors, so
that one graph serves all tokens.

Legend: B rows, H heads, D head width, K kernel of a convolution, P columns that are always visible, W columns that come
and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.layers.attention import Attention, AttentionCache, AttentionState
from titans.layers.convolution import ShortConvolution
from titans.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans.ops.attention import apply_rotary, rotary_angles
from titans.ops.memory import Tokens, decode, pick
from titans.ops.memory.native.step import StepSettings, StepToken
from titans.ops.memory.state import StepMemory
from titans.ops.place import Place
from titans.ops.rows import columns, flags, gather
from titans.state import State


@dataclass(frozen=True)
class StepNeuralMemory(State):
    """The memory, and the last inputs of its convolution [B, K-1, 3·H·D] (None without one)."""

    memory: StepMemory
    tail: Tensor | None


def unstepped(layer: NeuralMemory) -> str | None:
    """Why a memory has no step of fixed shapes, as the end of a sentence; None where it has."""
    if layer.engine not in ("auto", "native", "fused"):
        return f"engine {layer.engine!r} was asked for"
    return decode.unstepped(layer.miras)


def begin_memory(layer: NeuralMemory, state: NeuralMemoryState, seen: Sequence[int]) -> StepNeuralMemory:
    """Buffers of what ``state`` holds of rows that have read ``seen`` tokens; 0 for a new stream."""
    return StepNeuralMemory(decode.begin(layer.rule, state.memory, seen), begin_tail(state.tail, seen))


def end_memory(state: StepNeuralMemory, seen: Sequence[int]) -> NeuralMemoryState:
    """Undo `begin_memory`, of rows that have read ``seen`` tokens by now."""
    return NeuralMemoryState(decode.end(state.memory, seen), state.tail)


def step_memory(
    layer: NeuralMemory, x: Tensor, state: StepNeuralMemory, place: Place, offset: int = 0
) -> tuple[Tensor, StepNeuralMemory]:
    """``layer`` over one token x [B, 1, d_model] of every row.

    Args:
        offset: tokens that the memory had read before each stream's first.
    """
    projected = layer.qkv(x)
    if _compiled(layer, projected, state):
        return _step_compiled(layer, x, projected, state, place, offset)
    projected, tail = step_convolution(layer.conv, projected, state.tail, place)
    gates, delta = layer.gates(x)
    tokens = Tokens(*layer.heads(projected), gates, delta)
    y, memory = decode.step(layer.rule, tokens, state.memory, place, offset)
    return layer.output(y, x), StepNeuralMemory(memory, tail)


def _compiled(layer: NeuralMemory, projected: Tensor, state: StepNeuralMemory) -> bool:
    """May C++ do what lies between the projections?"""
    if torch.compiler.is_compiling() or pick(layer.engine, layer.miras, projected.device)[0] != "native":
        return False
    found = {projected.dtype, layer.read_norm.weight.dtype, state.memory.tokens.dtype}
    return found <= {torch.float32} or found <= {torch.float64}


def _step_compiled(
    layer: NeuralMemory, x: Tensor, projected: Tensor, state: StepNeuralMemory, place: Place, offset: int
) -> tuple[Tensor, StepNeuralMemory]:
    conv = None if layer.conv is None else layer.conv.weight
    token = StepToken(projected, layer.gates.up(x), layer.read_gate(x), state.tail, conv)
    norm = layer.read_norm
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    settings = StepSettings(layer.gates.theta_max, layer.qkv_activation == "silu", norm.weight, eps)
    y, ready, memory, tail = decode.step_compiled(layer.rule, token, settings, state.memory, place, offset)
    return layer.out(y) if ready else layer.output(y.unsqueeze(2), x), StepNeuralMemory(memory, tail)


def begin_tail(tail: Tensor | None, seen: Sequence[int]) -> Tensor | None:
    """A convolution's tail, zeros for the rows that begin a stream."""
    if tail is None or all(seen):
        return tail
    return tail.masked_fill(flags([n == 0 for n in seen], tail), 0)


def _laid_out(x: Tensor) -> Tensor:
    """A copy of the strides that every step's tensors have; ``contiguous`` leaves those of a batch of one alone."""
    return x.clone(memory_format=torch.contiguous_format)


def step_convolution(
    conv: ShortConvolution | None, x: Tensor, tail: Tensor | None, place: Place
) -> tuple[Tensor, Tensor | None]:
    """``conv`` over one token x [B, 1, channels]; x itself without one."""
    if conv is None or tail is None:
        return x, None
    padded = torch.cat((tail.to(x.dtype), x), 1)
    after = place.keep(_laid_out(padded[:, 1:]), tail.to(x.dtype))
    return (padded * conv.weight.to(x.dtype)).sum(1, keepdim=True), after


@dataclass(frozen=True)
class StepAttention(State):
    """Keys and values side by side, and the last inputs of the convolution.

    Attributes:
        cache: [B, H, P + W, 2·D]: P columns that every token sees, then W that tokens fill in a circle; keys of tokens
            are rotated.
        tail: [B, K-1, 3·d_model], None without a convolution.
    """

    cache: Tensor
    tail: Tensor | None


def begin_attention(
    layer: Attention, state: AttentionState, seen: Sequence[int], persistent: Tensor | None = None
) -> StepAttention:
    """Buffers of a sliding window; ``persistent`` [B or 1, P, d_model] as `Attention` takes it."""
    assert layer.window is not None
    cache = begin_circle(state.cache, seen, layer.window).to(layer.q.weight.dtype)
    if persistent is not None:
        fixed = side_by_side(*layer.keys_values(persistent)).to(cache)
        cache = torch.cat((fixed.expand(len(seen), -1, -1, -1), cache), 2)
    return StepAttention(cache, begin_tail(state.tail, seen))


def end_attention(layer: Attention, state: StepAttention, seen: Sequence[int]) -> AttentionState:
    """Undo `begin_attention`, of rows that have read ``seen`` tokens by now."""
    assert layer.window is not None
    circle = state.cache[:, :, state.cache.shape[2] - layer.window :]
    return AttentionState(end_circle(circle, seen, min(max(seen), layer.window - 1)), state.tail)


def step_attention(layer: Attention, x: Tensor, state: StepAttention, place: Place) -> tuple[Tensor, StepAttention]:
    """``layer`` with a sliding window, over one token x [B, 1, d_model] of every row."""
    width = layer.window
    assert width is not None
    (plain, keys, values), _, tail = project(layer, x, state.tail, place)
    q, keys = rotated(layer, place, plain, keys)
    fixed = state.cache.shape[2] - width
    cache = place.put(
        state.cache, place.column(width) + fixed, side_by_side(keys, values).to(state.cache), place.overwrites
    )
    hidden = place.once(("window", width, fixed), lambda: empty(place.read.unsqueeze(1), width, fixed))
    return layer.out(attend(q, plain, cache, fixed, hidden)), StepAttention(cache, tail)


def project(
    layer: Attention, x: Tensor, tail: Tensor | None, place: Place, beside: Tensor | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Queries, keys (neither rotated) and values of one token; keys and values of a vector that is no token of the
    stream, ``beside`` [B, 1, d_model]; each [B, 1, H, D]. And the convolution's new tail."""
    pairs = layer.kv(x if beside is None else torch.cat((x, beside), 1))  # one pass over the weights
    projected, tail = step_convolution(layer.conv, torch.cat((layer.q(x), pairs[:, :1]), -1), tail, place)
    own = projected.unflatten(-1, (3, layer.n_heads, layer.head_dim)).unbind(2)
    other = pairs[:, 1:].unflatten(-1, (2, layer.n_heads, layer.head_dim)).unbind(2)
    return own, other, tail


def rotated(layer: Attention, place: Place, *vectors: Tensor, modulo: int | None = None) -> tuple[Tensor, ...]:
    """Queries and keys [B, 1, H, D] turned by their token's position, within cells of ``modulo``."""

    def angles() -> tuple[Tensor, Tensor]:
        positions = place.read.unsqueeze(1) if modulo is None else place.column(modulo)
        dtype = torch.promote_types(vectors[0].dtype, torch.float32)
        found = rotary_angles(positions, layer.head_dim, layer.rope_base, dtype)
        return tuple(x.expand(-1, len(vectors), -1) for x in found)  # type: ignore[return-value]

    cos, sin = place.once(("angles", layer.head_dim, layer.rope_base, modulo, len(vectors)), angles)
    return apply_rotary(torch.cat(vectors, 1), cos, sin).split(1, 1)


def side_by_side(keys: Tensor, values: Tensor) -> Tensor:
    """Keys and values [B, n, H, D] as columns of a cache, [B, H, n, 2·D]."""
    return torch.cat((keys, values), -1).transpose(1, 2)


def empty(last: Tensor, width: int, fixed: int, times: int = 1) -> Tensor:
    """Where a cache holds nothing, [B, 1, 1, P + times · width]: after P = ``fixed`` columns come ``times`` ``width``
    of them, of which those up to ``last`` [B, 1] hold something."""
    found = torch.arange(width, device=last.device) > last
    return F.pad(torch.cat([found] * times, 1), (fixed, 0), value=False).view(len(last), 1, 1, -1)


def attend(q: Tensor, plain: Tensor, cache: Tensor, fixed: int, hidden: Tensor) -> Tensor:
    """One softmax over a cache's columns.

    Args:
        q, plain: one token's queries, rotated and not, [B, 1, H, D].
        cache: [B, H, P + W, 2·D]; the first ``fixed`` = P columns are scored by ``plain``.
        hidden: bool [B, 1, 1, P + W], True for columns that are not seen.

    Returns:
        [B, 1, H·D].
    """
    keys, values = cache.chunk(2, -1)
    scores = q.transpose(1, 2) @ keys[:, :, fixed:].mT
    if fixed:
        scores = torch.cat((plain.transpose(1, 2) @ keys[:, :, :fixed].mT, scores), -1)
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    chances = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(values.dtype)
    return (chances @ values).transpose(1, 2).flatten(2)


def begin_circle(cache: AttentionCache, seen: Sequence[int], width: int) -> Tensor:
    """A right-aligned cache [B, w, H, D] of streams that have ``seen`` tokens, in a circle of ``width`` columns."""
    held = cache.keys.shape[1]
    last = torch.tensor(seen).unsqueeze(1) - 1
    token = last - (last - torch.arange(width)) % width  # the newest one whose column this is
    source = token - last - 1 + held
    index = source.masked_fill((token < 0) | (source < 0), -1)
    return side_by_side(*(gather(x, index) for x in (cache.keys, cache.values)))


def end_circle(circle: Tensor, seen: Sequence[int], held: int) -> AttentionCache:
    """The last ``held`` tokens of a circle [B, H, W, 2·D] of streams that have ``seen`` by now, right-aligned."""
    index = (torch.tensor(seen).unsqueeze(1) - held + torch.arange(held)) % circle.shape[2]
    keys, values = gather(circle.transpose(1, 2), index).chunk(2, -1)
    return AttentionCache(keys, values)


def begin_columns(cache: AttentionCache, counts: Sequence[int], width: int) -> Tensor:
    """The last ``counts[b]`` columns of a right-aligned cache [B, w, H, D], from column 0 of ``width`` on."""
    number, held = torch.tensor(counts).unsqueeze(1), cache.keys.shape[1]
    index = torch.arange(width) + held - number
    index = index.masked_fill(torch.arange(width) >= number, -1)
    return side_by_side(*(gather(x, index) for x in (cache.keys, cache.values)))


def end_columns(buffer: Tensor, counts: Sequence[int]) -> AttentionCache:
    """The first ``counts[b]`` columns of a buffer [B, H, W, 2·D], right-aligned."""
    held = max(counts)
    keys, values = columns(buffer.transpose(1, 2), [n - held for n in counts], held).chunk(2, -1)
    return AttentionCache(keys, values)
