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
from titans.layers.module import RMSNorm
from titans.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans.layers.vectors import compiled, like, plain, step_linear
from titans.ops.attention import apply_rotary, rotary_angles
from titans.ops.memory import Tokens, decode, pick
from titans.ops.memory.native import vectors
from titans.ops.memory.native.step import StepSettings, StepToken
from titans.ops.memory.native.vectors import AttendToken
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
    return StepNeuralMemory(decode.begin(layer.rule, state.memory, seen), begin_tail(layer.conv, state.tail, seen))


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
    projected = step_linear(layer.qkv, x, place)
    if compiled(place, projected) and native(layer, projected, layer.conv, state.tail, state.memory.tokens):
        return _step_compiled(layer, x, projected, state, place, offset)
    projected, tail = step_convolution(layer.conv, projected, state.tail, place)
    gates, delta = layer.gates(x)
    tokens = Tokens(*layer.heads(projected), gates, delta)
    y, memory = decode.step(layer.rule, tokens, state.memory, place, offset)
    return layer.output(y, x), StepNeuralMemory(memory, tail)


def native(
    layer: NeuralMemory, projected: Tensor, conv: ShortConvolution | None, tail: Tensor | None, state: Tensor
) -> bool:
    """May C++ do what lies between the projections: is all that it would be given of one dtype?"""
    if pick(layer.engine, layer.miras, projected.device)[0] != "native":
        return False
    weights = layer.read_norm.weight, layer.norm_gain, layer.norm_bias, None if conv is None else conv.weight
    return all(x is None or x.dtype == projected.dtype for x in (*weights, tail, state))


def _step_compiled(
    layer: NeuralMemory, x: Tensor, projected: Tensor, state: StepNeuralMemory, place: Place, offset: int
) -> tuple[Tensor, StepNeuralMemory]:
    conv, norm = None if layer.conv is None else layer.conv.weight, layer.read_norm
    logits, gate = step_linear(layer.gates.up, x, place), step_linear(layer.read_gate, x, place)
    token = StepToken(projected, state.tail, conv, logits, gate)
    settings = StepSettings(layer.gates.theta_max, layer.qkv_activation == "silu", norm.weight, norm.eps_of(x))
    y, ready, memory, tail = decode.step_compiled(layer.rule, token, settings, state.memory, place, offset)
    y = step_linear(layer.out, y, place) if ready else layer.output(y.unsqueeze(2), x)
    return y, StepNeuralMemory(memory, tail)


def step_recall(
    layer: NeuralMemory, x: Tensor, norm: RMSNorm, conv: ShortConvolution | None, maps: tuple[Tensor, ...],
    tail: Tensor | None, place: Place,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A read of one query per row at weights, normalised.

    Args:
        layer: whose memory it is.
        x: projected queries [B, 1, H·D].
        norm: of what is found.
        conv, tail: the convolution that the queries pass first, and its last inputs.
        maps: W = φ(A) of the weights A, [B, H, out, in] each.

    Returns:
        [B, 1, H·D], and the convolution's new tail.
    """
    if compiled(place, x) and plain(x, norm) and native(layer, x, conv, tail, maps[0]):
        token = StepToken(x, tail, None if conv is None else conv.weight)
        settings = StepSettings(0.0, layer.qkv_activation == "silu", norm.weight, norm.eps_of(x))
        return decode.read_compiled(layer.rule, token, settings, maps, place.active)
    x, after = step_convolution(conv, x, tail, place)
    return norm(decode.read(layer.rule, layer.normalise(x), maps).flatten(2)), after


def begin_tail(conv: ShortConvolution | None, tail: Tensor | None, seen: Sequence[int]) -> Tensor | None:
    """A convolution's tail in its weights' dtype, zeros for the rows that begin a stream."""
    if conv is None or tail is None:
        return None
    tail = tail.to(conv.weight.dtype)
    return tail if all(seen) else tail.masked_fill(flags([n == 0 for n in seen], tail), 0)


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
    after = place.keep(_laid_out(padded[:, 1:]).to(tail.dtype), tail)  # x's may be another one, under autocast
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
    return StepAttention(cache, begin_tail(layer.conv, state.tail, seen))


def end_attention(layer: Attention, state: StepAttention, seen: Sequence[int]) -> AttentionState:
    """Undo `begin_attention`, of rows that have read ``seen`` tokens by now."""
    assert layer.window is not None
    circle = state.cache[:, :, state.cache.shape[2] - layer.window :]
    return AttentionState(end_circle(circle, seen, min(max(seen), layer.window - 1)), state.tail)


def step_attention(
    layer: Attention, x: Tensor, state: StepAttention, place: Place, segment: int = 0, beside: Tensor | None = None
) -> tuple[Tensor, StepAttention]:
    """``layer`` over one token x [B, 1, d_model] of every row: with a sliding window, or over a segment of MAC.

    Args:
        segment, beside: the segment's length, and a vector [B, 1, d_model] that belongs to the token: as many columns
            for such vectors then stand before those for tokens.
    """
    size, times = (layer.window, 1) if beside is None else (segment, 2)
    assert size is not None
    fixed, column = state.cache.shape[2] - times * size, place.column(size)
    last = place.read.unsqueeze(1) if beside is None else column
    hidden = place.once(("hidden", size, fixed, times), lambda: empty(last, size, fixed, times))
    in_place = place.overwrites if beside is None else place.extends(size)
    angles = _angles(layer, place, x.dtype, segment or None)
    # One pass over the weights for both.
    pairs = step_linear(layer.kv, x if beside is None else torch.cat((x, beside), 1), place)
    projected = torch.cat((step_linear(layer.q, x, place), pairs[:, :1]), -1)
    other, conv = None if beside is None else pairs[:, 1:], layer.conv
    kept = (state.cache, None if conv is None else conv.weight, state.tail)
    if compiled(place, projected) and all(x is None or like(projected, x) for x in kept):
        cache = state.cache if in_place else state.cache.clone()
        token = AttendToken(projected, state.tail, None if conv is None else conv.weight, other, *angles)
        y, tail = vectors.attend(token, cache, size, column, hidden, place.active)
        return step_linear(layer.out, y, place), StepAttention(cache, tail)
    projected, tail = step_convolution(conv, projected, state.tail, place)
    q, *new = projected.unflatten(-1, (3, layer.n_heads, layer.head_dim)).unbind(2)
    columns = column + fixed
    if other is not None:
        new = [torch.cat(x, 1) for x in zip(layer.heads(other), new, strict=True)]
        columns = torch.cat((columns, columns + size), 1)
    keys = apply_rotary(new[0], *(a.expand(-1, times, -1) for a in angles))
    cache = place.put(state.cache, columns, side_by_side(keys, new[1]).to(state.cache), in_place)
    y = attend(apply_rotary(q, *angles), q, cache, fixed, hidden)
    return layer.out(y), StepAttention(cache, tail)


def _angles(layer: Attention, place: Place, dtype: torch.dtype, modulo: int | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the token's position, within cells of ``modulo`` tokens; [B, 1, D / 2]."""

    def make() -> tuple[Tensor, Tensor]:
        positions = place.read.unsqueeze(1) if modulo is None else place.column(modulo)
        return rotary_angles(positions, layer.head_dim, layer.rope_base, torch.promote_types(dtype, torch.float32))

    return place.once(("angles", layer.head_dim, layer.rope_base, modulo, dtype), make)


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
