"""Memory as a context: the MAC mixer (Titans §4.1).

Legend: B batch, T tokens, P persistent tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.attention import AttentionCache, first_columns
from titans.layers.convolution import ShortConvolution
from titans.layers.decoding import (
    StepAttention,
    begin_columns,
    begin_memory,
    begin_tail,
    end_columns,
    end_memory,
    side_by_side,
    unstepped,
)
from titans.layers.module import Linear, RMSNorm
from titans.layers.neural_memory import NeuralMemoryState
from titans.layers.persistent_memory import PersistentMemory
from titans.models.config import TitansConfig
from titans.models.mixers.mac_steps import StepMAC, step_mac
from titans.models.mixers.parts import make_attention, make_memory, make_persistent
from titans.models.registry import Mixer
from titans.ops.attention import apply_rotary, segment_attention
from titans.ops.grid import Block, Grid, Remainder, remainders
from titans.ops.memory import MemoryState, decode
from titans.ops.memory.native import around
from titans.ops.place import Place
from titans.ops.rows import Rows, flags
from titans.state import State, counts

# What the memory recalls starts out quiet beside the tokens. At 1, an untrained MAC feeds its own recollections back
# through attention until the gradient of a first step is ten times as large (docs/results/core.md).
INITIAL_CONTEXT = 0.1
Maps = tuple[Tensor, ...]
Tails = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class MACState(State):
    """One MAC layer's streams.

    Attributes:
        memory: the memory as it stands.
        previous: its weights A as they stood at the end of the previous segment, per map.
        context_tail, attention_tail: convolution tails of the context queries and of attention, None without one.
        tokens, reads: keys and values of the open segment's tokens and of the memory's reads for them.
    """

    memory: NeuralMemoryState
    previous: Maps
    context_tail: Tensor | None
    attention_tail: Tensor | None
    tokens: AttentionCache
    reads: AttentionCache


@dataclass(frozen=True)
class Projected:
    """What attention takes from each token, [B, T, ...]: context queries for the memory, plain and rotated queries,
    rotated keys, values, and the rotation itself (cosines and sines [T or B, T, D / 2])."""

    context: Tensor
    plain: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor

    def cut(self, grid: Grid) -> list[Projected]:
        """The parts of the grid's blocks."""
        laid = []
        for x in vars(self).values():
            shared = x.dim() == 2  # one rotation for all rows
            if shared and grid.source is not None:
                x, shared = x.expand(self.plain.shape[0], -1, -1), False
            laid.append(x.split(grid.widths) if shared else grid.lay(x).split(grid.widths, 1))
        return [Projected(*part) for part in zip(*laid, strict=True)]


class MACMixer(Mixer):
    """Memory as a context, segment by segment (Titans Eqs. 21-25).

    h_j is read from the memory as it stood at the end of the previous segment; token i attends to P, to h_j with j ≤ i
    and to the segment's tokens j ≤ i; the result y_i, normalised, is written into the memory; the output is
    o_i = y_i ⊗ SiLU(m_i) + a ⊗ y_i + b ⊗ m_i with m_i = n(M_i(y_i)).

    The paper leaves the gate open. a and b, learned from 1 on, let attention and memory pass by themselves, as in MAG.
    """

    variants = ("MAC",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.segment = config.segment
        self.memory = make_memory(config)
        self.persistent = make_persistent(config)
        self.summary = PersistentMemory(config.n_memory_tokens, config.d_model) if config.n_memory_tokens else None
        self.attention = make_attention(config, None, itself=config.segment)
        width = config.memory_width
        self.context_query = Linear(config.d_model, width)
        self.context_conv = ShortConvolution(width, config.conv_kernel) if config.conv_kernel else None
        self.context_norm = RMSNorm(width)
        self.context_out = Linear(width, config.d_model) if width != config.d_model else None
        self.attention_norm = RMSNorm(config.d_model)
        self.memory_norm = RMSNorm(config.d_model)
        self.attention_through = nn.Parameter(torch.empty(config.d_model))
        self.memory_through = nn.Parameter(torch.empty(config.d_model))
        self.initialise()

    def initialise(self) -> None:
        nn.init.constant_(self.context_norm.weight, INITIAL_CONTEXT)
        nn.init.ones_(self.attention_through)
        nn.init.ones_(self.memory_through)

    def forward(self, x: Tensor, state: MACState | None, rows: Rows, store: Tensor | None) -> tuple[Tensor, MACState]:
        tokens, tails = self._project(
            x, (None, None) if state is None else (state.context_tail, state.attention_tail), rows
        )
        walk = _Walk(self, tokens, state, rows)
        grid = Grid.of(rows, self.segment)
        stores = [None] * len(grid.blocks) if store is None else grid.lay(store).split(grid.widths, 1)
        for block, part, stored in zip(grid.blocks, tokens.cut(grid), stores, strict=True):
            walk.take(block, part, stored)
        y, read = (grid.gather(torch.cat(pieces, 1)) if pieces else torch.zeros_like(x) for pieces in walk.pieces)
        return self.gate(y, self.memory_norm(read)), walk.state(tails, rows)

    def gate(self, y: Tensor, read: Tensor) -> Tensor:
        return y * (F.silu(read) + self.attention_through) + read * self.memory_through

    def _project(self, x: Tensor, tails: Tails, rows: Rows) -> tuple[Projected, Tails]:
        context, tail = self.context_query(x), None
        if self.context_conv is not None:
            context, tail = self._convolved(context, tails[0], rows)
        else:
            context = self.memory.normalise(context)
        plain, keys, values, attention_tail = self.attention.project(x, tails[1], rows)
        cos, sin = self.attention.angles(rows, plain, self.segment)
        rotated = apply_rotary(plain, cos, sin), apply_rotary(keys, cos, sin)
        return Projected(context, plain, *rotated, values, cos, sin), (tail, attention_tail)

    def _convolved(self, context: Tensor, tail: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """Context queries, of unit length per head [B, T, H, D], and the convolution's new tail."""
        assert self.context_conv is not None
        if self.memory.compiles:
            found = self.context_conv.heads(context, tail, rows, (around.UNIT,), self.memory.head_dim)
            if found is not None:
                return found  # type: ignore[return-value]
        context, after = self.context_conv(context, tail, rows)
        return self.memory.normalise(context), after

    def attend(
        self, part: Projected, previous: Maps, caches: tuple[AttentionCache, AttentionCache] | None, rows: Rows
    ) -> tuple[Tensor, tuple[AttentionCache, AttentionCache]]:
        """What is written of one segment's tokens.

        Args:
            part: the tokens.
            previous: the memory's weights at the end of the previous segment.
            caches: earlier tokens of the segment and the reads for them.
            rows: where the rows stand within the segment.

        Returns:
            y [B, T, d_model], and the caches with the new columns.
        """
        read_keys, read_values = self.attention.keys_values(self.recall(part.context, previous))
        new = AttentionCache(part.keys, part.values)
        reads = AttentionCache(apply_rotary(read_keys, part.cos, part.sin), read_values)
        cached = 0
        if caches is not None:
            cached = caches[0].keys.shape[1]
            new, reads = caches[0].then(new), caches[1].then(reads)
        fixed = self.fixed(previous, part.plain.shape[0])
        y = segment_attention(
            part.queries, new.keys, new.values, reads.keys, reads.values,
            start=first_columns(rows, cached, new.keys.device), persistent=fixed and (part.plain, *fixed),
        )  # fmt: skip
        return self.attention_norm(self.attention.out(y.flatten(2))), (new, reads)

    def recall(self, queries: Tensor, previous: Maps) -> Tensor:
        """h: what the memory of the previous segment's end knows about queries [B, n, H, D] of unit length.

        No gate, and no output projection where the widths fit: attention's own projections follow.
        """
        h = self.context_norm(self.memory.recall(queries, previous))
        return h if self.context_out is None else self.context_out(h)

    def fixed(self, previous: Maps, rows: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values that every token of the segment sees: P, and the reads with learned queries."""
        tokens = []
        if self.persistent is not None:
            tokens.append(self.persistent.P.unsqueeze(0))
        if self.summary is not None:
            summary = self.summary.P.expand(rows, -1, -1)
            tokens.append(self.recall(self.memory.normalise(self.context_query(summary)), previous))
        if not tokens:
            return None
        rows = max(t.shape[0] for t in tokens)
        return self.attention.keys_values(torch.cat([t.expand(rows, -1, -1) for t in tokens], 1))

    def whole_segment(
        self, part: Projected, weights: Maps, momentum: Maps, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Maps, Maps, Tensor | None]:
        """A whole segment of whole chunks as if it were the second one: what ``torch.compile`` sees.

        Returns:
            y, the memory's reads of it, and (A, S) and the convolution tail after it.
        """
        batch = part.plain.shape[0]
        rows = Rows.whole((self.segment,) * batch, self.segment)
        begun = self.memory.begin(part.context).memory
        before = replace(begun, weights=weights, momentum=momentum, read=counts(rows.seen))
        y, _ = self.attend(part, weights, None, Rows.whole((0,) * batch, self.segment))
        read, after = self.memory(y, NeuralMemoryState(before, tail), return_state=True, rows=rows)
        return y, read, after.memory.weights, after.memory.momentum, after.tail

    def unstepped(self) -> str | None:
        return unstepped(self.memory)

    def begin_steps(self, state: MACState, seen: Sequence[int]) -> StepMAC:
        memory = begin_memory(self.memory, state.memory, seen)
        first = self.memory.start(len(seen), memory.memory.tokens.dtype)
        held = tuple(w.to(f.dtype) for w, f in zip(state.previous, first, strict=True))
        previous = _where([not (n and m) for n, m in zip(seen, state.memory.seen, strict=True)], first, held)
        phases = [n % self.segment for n in seen]
        parts = [begin_columns(cache, phases, self.segment) for cache in (state.reads, state.tokens)]
        if (fixed := self.fixed(previous, len(seen))) is not None:
            parts.insert(0, side_by_side(*fixed).expand(len(seen), -1, -1, -1))
        cache = torch.cat([x.to(self.attention.q.weight.dtype) for x in parts], 2)
        context_tail = begin_tail(self.context_conv, state.context_tail, seen)
        attention_tail = begin_tail(self.attention.conv, state.attention_tail, seen)
        recalled = decode.shown(self.memory.rule, previous)
        return StepMAC(memory, previous, recalled, context_tail, StepAttention(cache, attention_tail))

    def step(self, x: Tensor, state: StepMAC, place: Place) -> tuple[Tensor, StepMAC]:
        return step_mac(self, x, state, place)

    def end_steps(self, state: StepMAC, seen: Sequence[int]) -> MACState:
        phases = [n % self.segment for n in seen]
        *_, reads, tokens = state.attention.cache.split(
            [state.attention.cache.shape[2] - 2 * self.segment, self.segment, self.segment], 2
        )
        reads, tokens = (end_columns(x, phases) for x in (reads, tokens))
        tails = state.context_tail, state.attention.tail
        return MACState(end_memory(state.memory, seen), state.previous, *tails, tokens, reads)


def _where(rows: Sequence[bool], new: Maps, old: Maps) -> Maps:
    if all(rows) or not any(rows):
        return new if all(rows) else old
    return tuple(torch.where(flags(rows, n), n, o.to(n.dtype)) for n, o in zip(new, old, strict=True))


class _Walk:
    """The loop over segments: what it carries along, and the outputs so far."""

    def __init__(self, mixer: MACMixer, tokens: Projected, state: MACState | None, rows: Rows):
        self.mixer, self.tokens = mixer, tokens
        self.first = mixer.memory.start(len(rows.seen), tokens.plain.dtype)
        nothing = AttentionCache(tokens.keys[:, :0], tokens.values[:, :0])
        self.caches = (nothing, nothing) if state is None else (state.tokens, state.reads)
        self.memory = None if state is None else state.memory
        self.previous = self.first
        if state is not None:
            fresh = [s == 0 or n == 0 for s, n in zip(rows.seen, state.memory.seen, strict=True)]
            self.previous = _where(fresh, self.first, state.previous)
        self.pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.open: list[Remainder] = []

    def take(self, block: Block, part: Projected, store: Tensor | None) -> None:
        """One segment's tokens, or those of it that a call still has."""
        if not block.width:  # rows inside a segment have no token here, and the others are at a segment's start
            self._leave(block, self.caches)
            return
        self.previous = _where(block.fresh, self.first, self.previous)
        if store is None and self._compilable(block):
            y, read = self._compiled(part, block)
        else:
            phases = tuple(s % self.mixer.segment for s in block.seen)
            caches = self.caches if block.first else None
            y, joined = self.mixer.attend(part, self.previous, caches, Rows(phases, block.counts, block.width))
            read, self.memory = self.mixer.memory(y, self.memory, return_state=True, store_mask=store, rows=block.rows)
            if any(block.ending):
                self._leave(block, joined)
        if any(block.closing):
            assert self.memory is not None
            self.previous = _where(block.closing, self.memory.memory.weights, self.previous)
        self.pieces[0].append(y)
        self.pieces[1].append(read)

    def _leave(self, block: Block, caches: tuple[AttentionCache, AttentionCache]) -> None:
        """Note what the rows that end here leave of their open segment."""
        cached = caches[0].keys.shape[1] - block.width
        tensors = (caches[0].keys, caches[0].values, caches[1].keys, caches[1].values)
        self.open.append(Remainder(block.ending, tuple(cached + n for n in block.counts), tensors))

    def state(self, tails: Tails, rows: Rows) -> MACState:
        """Where the rows stand after their last tokens."""
        memory = self.memory or self.mixer.memory.begin(self.tokens.context)
        width = max(n % self.mixer.segment for n in rows.after)
        like = tuple(x for cache in self.caches for x in (cache.keys, cache.values))
        found = remainders(self.open, width, like) if self.open or self.pieces[0] else like
        return MACState(memory, self.previous, *tails, AttentionCache(*found[:2]), AttentionCache(*found[2:]))

    def _compilable(self, block: Block) -> bool:
        """Is this a whole segment in every row, does it consist of whole chunks, and is that wanted?"""
        memory, size = self.mixer.memory, self.mixer.segment
        wanted = memory.engine == "compiled" and not block.first and block.closes and not any(block.fresh)
        return wanted and block.width % memory.chunk_size == 0 and not any(s % size for s in block.seen)

    def _compiled(self, part: Projected, block: Block) -> tuple[Tensor, Tensor]:
        """A whole segment through ``torch.compile``.

        At a segment's start the memory of the previous segment's end is the memory. All that the compiled function
        sees of the state are tensors of the graph: one compilation serves every layer and segment, the first included.
        """
        training = part.context.requires_grad
        begun = self.memory or self.mixer.memory.begin(part.context)
        rows = [n == 0 for n in begun.seen]
        weights = _where(rows, self.first, begun.memory.weights)
        momentum = _where(rows, tuple(map(torch.zeros_like, begun.memory.momentum)), begun.memory.momentum)
        conv = self.mixer.memory.conv
        tail = None if conv is None else conv.start(part.context, begun.tail, block.seen)
        inputs = [
            tuple(_as_part_of_the_graph(training, x) for x in maps)
            for maps in (weights, momentum, () if tail is None else (tail,))
        ]
        y, read, weights, momentum, tail = _compiled_segment()(
            self.mixer, part, inputs[0], inputs[1], inputs[2][0] if inputs[2] else None
        )
        after = counts([s + block.width for s in block.seen])
        memory: MemoryState = replace(begun.memory, weights=weights, momentum=momentum, read=after)
        self.memory = NeuralMemoryState(memory, tail)
        return y, read


def _as_part_of_the_graph(training: bool, x: Tensor) -> Tensor:
    """``torch.compile`` starts again when an input ceases to need a gradient: in training all of them do."""
    x = x.contiguous()
    return x.detach().requires_grad_() if training and not x.requires_grad else x


@cache
def _compiled_segment() -> Callable:
    return torch.compile(MACMixer.whole_segment, dynamic=False)
