"""MAC one token at a time, in fixed shapes.

Legend: B rows, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans.layers.decoding import (
    StepAttention,
    StepNeuralMemory,
    attend,
    empty,
    project,
    rotated,
    side_by_side,
    step_convolution,
    step_memory,
)
from titans.ops.memory import decode
from titans.ops.place import Place, branch, choose, unchanged
from titans.state import State

if TYPE_CHECKING:
    from titans.models.mixers.mac import MACMixer

Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class StepMAC(State):
    """`MACState` in buffers of fixed shapes.

    Attributes:
        memory, previous, context_tail: as there.
        recalled: φ(previous); empty where that is the same.
        attention: always visible columns, then the reads for the segment's tokens, then the tokens.
    """

    memory: StepNeuralMemory
    previous: Maps
    recalled: Maps
    context_tail: Tensor | None
    attention: StepAttention


def step_mac(mixer: MACMixer, x: Tensor, state: StepMAC, place: Place) -> tuple[Tensor, StepMAC]:
    """``mixer`` over one token x [B, 1, d_model] of every row."""
    context, context_tail = step_convolution(mixer.context_conv, mixer.context_query(x), state.context_tail, place)
    y, attention = _step_attention(mixer, x, context, state, place)
    read, memory = step_memory(mixer.memory, y, state.memory, place)
    rows, some = place.ends(mixer.segment)

    def close(rows: Tensor, weights: Maps, used: Maps, *old: Any) -> tuple[Maps, Maps, Maps]:
        previous, recalled = (
            tuple(choose(rows, n, o) for n, o in zip(*pair, strict=True)) for pair in zip((weights, used), old[:2])
        )
        return previous, recalled, tuple(_refixed(mixer, rows, cache, previous) for cache in old[2])

    caches = () if mixer.summary is None else (attention.cache,)
    given = (rows, memory.memory.weights, memory.memory.used, state.previous, state.recalled, caches)
    previous, recalled, caches = branch(some, close, _unclosed, given)
    attention = StepAttention(caches[0] if caches else attention.cache, attention.tail)
    after = StepMAC(memory, previous, recalled, context_tail, attention)
    return mixer.gate(y, read), after


def _unclosed(rows: Tensor, weights: Maps, used: Maps, *kept: Maps) -> tuple[Maps, ...]:
    """Nothing changes with a token inside a segment."""
    return tuple(tuple(map(unchanged, maps)) for maps in kept)


def _step_attention(
    mixer: MACMixer, x: Tensor, context: Tensor, state: StepMAC, place: Place
) -> tuple[Tensor, StepAttention]:
    """What is written of one token; ``context`` is its query for the last segment's memory [B, 1, d_model]."""
    layer, size = mixer.attention, mixer.segment
    recalled = decode.read(mixer.memory.rule, mixer.memory.normalise(context), state.recalled or state.previous)
    h = mixer.context(recalled.flatten(2))
    (plain, keys, values), (read_keys, read_values), tail = project(layer, x, state.attention.tail, place, beside=h)
    q, read_keys, keys = rotated(layer, place, plain, read_keys, keys, modulo=size)
    old = state.attention.cache
    fixed = old.shape[2] - 2 * size
    column = place.column(size) + fixed
    new = side_by_side(torch.cat((read_keys, keys), 1), torch.cat((read_values, values), 1))
    cache = place.put(old, torch.cat((column, column + size), 1), new.to(old), place.extends(size))
    hidden = place.once(("segment", size, fixed), lambda: empty(place.column(size), size, fixed, 2))
    y = mixer.attention_norm(layer.out(attend(q, plain, cache, fixed, hidden)))
    return y, StepAttention(cache, tail)


def _refixed(mixer: MACMixer, rows: Tensor, cache: Tensor, previous: Maps) -> Tensor:
    """The cache with the always visible columns of a segment that begins, in the samples ``rows``."""
    fixed = mixer.fixed(previous, len(rows))
    assert fixed is not None
    new = side_by_side(*fixed).to(cache)
    return torch.cat((choose(rows, new, cache[:, :, : new.shape[2]]), cache[:, :, new.shape[2] :]), 2)
