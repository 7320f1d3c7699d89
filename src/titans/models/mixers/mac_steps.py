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
    side_by_side,
    step_attention,
    step_memory,
    step_recall,
)
from titans.layers.vectors import step_linear, step_norm
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
    query = step_linear(mixer.context_query, x, place)
    recalled = state.recalled or state.previous
    h, context_tail = step_recall(
        mixer.memory, query, mixer.context_norm, mixer.context_conv, recalled, state.context_tail, place
    )
    if mixer.context_out is not None:
        h = step_linear(mixer.context_out, h, place)
    y, attention = step_attention(mixer.attention, x, state.attention, place, mixer.segment, h)
    y = step_norm(mixer.attention_norm, y, place)
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
    return mixer.gate(y, step_norm(mixer.memory_norm, read, place)), after


def _unclosed(rows: Tensor, weights: Maps, used: Maps, *kept: Maps) -> tuple[Maps, ...]:
    """Nothing changes with a token inside a segment."""
    return tuple(tuple(map(unchanged, maps)) for maps in kept)


def _refixed(mixer: MACMixer, rows: Tensor, cache: Tensor, previous: Maps) -> Tensor:
    """The cache with the always visible columns of a segment that begins, in the samples ``rows``."""
    fixed = mixer.fixed(previous, len(rows))
    assert fixed is not None
    new = side_by_side(*fixed).to(cache)
    return torch.cat((choose(rows, new, cache[:, :, : new.shape[2]]), cache[:, :, new.shape[2] :]), 2)
