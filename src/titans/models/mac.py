"""Memory as a context: the MAC mixer (Titans §4.1).

Legend: B batch, T tokens, P persistent tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.attention import Attention, AttentionCache, first_columns
from titans.layers.convolution import ShortConvolution
from titans.memory import NeuralMemoryState, PersistentMemory
from titans.models.branch import make_memory, make_persistent
from titans.models.config import TitansConfig
from titans.ops.attention import apply_rotary, segment_attention
from titans.ops.memory import MemoryState, State
from titans.ops.memory.rule import where_rows
from titans.ops.place import Place
from titans.ops.ragged import columns

# What the memory recalls starts out quiet beside the tokens. At 1, an untrained MAC feeds its own recollections back
# through attention until the gradient of a first step is ten times as large (docs/results/core.md).
INITIAL_CONTEXT = 0.1


@dataclass(frozen=True)
class MACState(State):
    """One MAC layer's streams.

    Attributes:
        memory: the memory as it stands.
        previous: the bare memory as it stood at the end of the previous segment.
        tail: convolution tail of the context queries, None without convolution.
        tokens, reads: keys and values of the open segment's tokens and of the memory's reads for them.
    """

    memory: NeuralMemoryState
    previous: MemoryState
    tail: Tensor | None
    tokens: AttentionCache
    reads: AttentionCache


class MACMixer(nn.Module):
    """Memory as a context, segment by segment (Titans Eqs. 21-25).

    h_j is read from the memory as it stood at the end of the previous segment; token i attends to P, to h_j with j ≤ i
    and to the segment's tokens j ≤ i; the result y_i, normalised, is written into the memory; the output is
    o_i = (b + y_i) ⊗ SiLU(n(M_i(y_i))). Only what the next segment waits for is computed segment by segment; the gate
    follows for all of them at once.

    The paper leaves the gate open. b, learned from 1 on, lets a read pass by itself: what is written must differ from
    token to token, and a product with it alone would be undone only by knowing it (docs/results/lasting.md).
    """

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.segment = config.segment
        self.memory = make_memory(config)
        self.persistent = make_persistent(config)
        self.summary = PersistentMemory(config.n_memory_tokens, config.d_model) if config.n_memory_tokens else None
        self.attention = Attention(config.d_model, config.attention_heads, None, config.rope_base)
        self.context_query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.context_conv = ShortConvolution(config.d_model, config.conv_kernel) if config.conv_kernel else None
        self.context_norm = nn.RMSNorm(config.d_model)
        nn.init.constant_(self.context_norm.weight, INITIAL_CONTEXT)
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.memory_norm = nn.RMSNorm(config.d_model)
        self.read_through = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor, state: MACState | None, place: Place, store: Tensor | None) -> tuple[Tensor, MACState]:
        tail = None if state is None else state.tail
        context = self.context_query(x)
        if self.context_conv is not None:
            context, tail = self.context_conv(context, tail, place)
        context = self.memory.normalise(context)
        plain = self.attention.queries(x)
        keys, values = self.attention.keys_values(x)
        phases = tuple(seen % self.segment for seen in place.seen)
        angles = self.attention.angles(Place(phases, place.tokens), plain, self.segment)
        queries, keys = apply_rotary(plain, *angles), apply_rotary(keys, *angles)
        whole = (context, plain, queries, keys, values)
        if place.lengths is None and len(set(phases)) == 1:
            y, read, state = self._uniform(whole, angles, state, place, store)
        else:
            y, read, state = self._ragged(whole, angles, state, place, store)
        gate = F.silu(self.memory_norm(self.memory.emit(read, y)))
        return (self.read_through + y) * gate, replace(state, tail=tail)

    def _uniform(
        self,
        whole: tuple[Tensor, ...],
        angles: tuple[Tensor, ...],
        state: MACState | None,
        place: Place,
        store: Tensor | None,
    ) -> tuple[Tensor, Tensor, MACState]:
        """All rows stand at the same place of their segment: plain splits."""
        first = min(self.segment - place.seen[0] % self.segment, place.tokens)
        full, rest = divmod(place.tokens - first, self.segment)
        sizes = [first, *[self.segment] * full, *([rest] if rest else [])]
        parts = zip(*(w.split(sizes, 1) for w in whole), strict=True)
        turns = zip(*(a.split(sizes) for a in angles), strict=True)
        stores = [None] * len(sizes) if store is None else store.split(sizes, 1)
        outputs, reads, seen = [], [], place.seen
        for size, part, turn, stored in zip(sizes, parts, turns, stores, strict=True):
            inside = Place(seen, size)
            if stored is None and self._compilable(size, state):
                y, read, state = self._compiled(part, turn, state, inside)
            else:
                y, read, state = self._segment(part, turn, state, inside, stored)
            outputs.append(y)
            reads.append(read)
            seen = inside.after
        assert state is not None  # T ≥ 1
        return torch.cat(outputs, 1), torch.cat(reads, 1), state

    def _ragged(
        self,
        whole: tuple[Tensor, ...],
        angles: tuple[Tensor, ...],
        state: MACState | None,
        place: Place,
        store: Tensor | None,
    ) -> tuple[Tensor, Tensor, MACState]:
        """Rows have phases and lengths of their own: each takes as many tokens per turn as its segment still holds."""
        if angles[0].dim() == 2:
            angles = tuple(a.expand(len(place.seen), -1, -1) for a in angles)
        outputs, reads, places = [], [], []
        done = [0] * len(place.seen)
        while any(d < n for d, n in zip(done, place.counts, strict=True)):
            phases = [(s + d) % self.segment for s, d in zip(place.seen, done, strict=True)]
            counts = [min(self.segment - p, n - d) for p, d, n in zip(phases, done, place.counts, strict=True)]
            width = max(counts)
            seen = tuple(s + d for s, d in zip(place.seen, done, strict=True))
            lengths = None if min(counts) == width else tuple(counts)
            part = tuple(columns(w, done, width) for w in whole)
            turn = tuple(columns(a, done, width) for a in angles)
            stored = None if store is None else columns(store, done, width)
            y, read, state = self._segment(part, turn, state, Place(seen, width, lengths), stored)
            outputs.append(y)
            reads.append(read)
            places.append((done, counts))
            done = [d + n for d, n in zip(done, counts, strict=True)]
        if state is None or not outputs:  # nothing but padding
            context, plain = whole[0], whole[1]
            state = state or _at_segment_start(self.memory.start(context, None), whole)
            return torch.zeros_like(plain).flatten(2), torch.zeros_like(context), state
        return _join(outputs, places, place.tokens), _join(reads, places, place.tokens), state

    def _segment(
        self,
        part: tuple[Tensor, ...],
        angles: tuple[Tensor, ...],
        state: MACState | None,
        place: Place,
        store: Tensor | None,
    ) -> tuple[Tensor, Tensor, MACState]:
        """Tokens of one segment (from its phase on); ``place`` counts from the stream's start.

        Returns:
            what was written [B, T, d_model], the memory's reads of it [B, T, H, D], and the state.
        """
        phases = tuple(s % self.segment for s in place.seen)
        previous = None if state is None else state.previous
        caches = (state.tokens, state.reads) if state is not None and any(phases) else None
        memory = None if state is None else state.memory
        y, read, memory, joined = self._attend_and_write(
            part, angles, memory, previous, caches, phases, place.lengths, store
        )
        cached = 0 if caches is None else caches[0].keys.shape[1]
        inside = Place(phases, place.tokens, place.lengths)
        closing = [n == self.segment for n in inside.after]
        previous = _advance_previous(previous, memory.memory, closing)
        open_width = max((n for n, c in zip(inside.after, closing, strict=True) if not c), default=0)
        ends = [cached + n for n in place.counts]
        tokens, reads = (cache.last(ends, open_width) for cache in joined)
        return y, read, MACState(memory, previous, None, tokens, reads)

    def _attend_and_write(
        self,
        part: tuple[Tensor, ...],
        angles: tuple[Tensor, ...],
        memory: NeuralMemoryState | None,
        previous: MemoryState | None,
        caches: tuple[AttentionCache, AttentionCache] | None,
        phases: tuple[int, ...],
        lengths: tuple[int, ...] | None,
        store: Tensor | None,
    ) -> tuple[Tensor, Tensor, NeuralMemoryState, tuple[AttentionCache, AttentionCache]]:
        """The arithmetic of ``_segment``; ``caches`` hold earlier tokens of the segment and the reads for them.

        Returns:
            what was written, the memory's reads of it, the memory after it, and the caches with the new columns.
        """
        context, plain, queries, keys, values = part
        read_keys, read_values = self.attention.keys_values(self._recall(context, previous))
        tokens, reads = AttentionCache(keys, values), AttentionCache(apply_rotary(read_keys, *angles), read_values)
        cached = 0
        if caches is not None:
            cached = caches[0].keys.shape[1]
            tokens, reads = caches[0].then(tokens), caches[1].then(reads)
        y = segment_attention(
            queries, tokens.keys, tokens.values, reads.keys, reads.values,
            start=first_columns(phases, cached, keys.device), persistent=self._always(plain, previous),
        )  # fmt: skip
        y = self.attention_norm(self.attention.out(y.flatten(2)))
        read, memory = self.memory.scan(y, memory, lengths, store)
        return y, read, memory, (tokens, reads)

    def _compilable(self, size: int, state: MACState | None) -> bool:
        """Is this a whole segment, does it consist of whole chunks, and is that wanted?"""
        return (
            self.memory.engine == "compiled"
            and size == self.segment
            and size % self.memory.chunk_size == 0
            and (state is None or not any(state.memory.memory.phases))
        )

    def _compiled(
        self, part: tuple[Tensor, ...], angles: tuple[Tensor, ...], state: MACState | None, place: Place
    ) -> tuple[Tensor, Tensor, MACState]:
        """``_segment`` for a whole segment, through ``torch.compile``.

        At a segment's start the memory of the previous segment's end is the memory. All that the compiled function
        sees of the state are tensors of the graph: one compilation serves every layer and segment, the first included.
        """
        start = self.memory.start(part[0], None if state is None else state.memory)
        tensors = start.map(partial(_as_part_of_the_graph, part[0].requires_grad))
        y, read, weights, momentum, tail = _compiled_segment()(
            self, part, angles, tensors.memory.weights, tensors.memory.momentum, tensors.tail
        )
        count = tuple(n + place.tokens for n in start.memory.count)
        memory = MemoryState(weights, momentum, None, count, self.memory.chunk_size)
        return y, read, _at_segment_start(NeuralMemoryState(memory, tail, place.after), part)

    def _whole_segment(
        self,
        part: tuple[Tensor, ...],
        angles: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        momentum: tuple[Tensor, ...],
        tail: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """A whole segment as if it were the second one: ``torch.compile`` starts again for every new token count."""
        rows = part[0].shape[0]
        seen = (self.segment,) * rows
        memory = MemoryState(weights, momentum, None, seen, self.memory.chunk_size)
        y, read, after, _ = self._attend_and_write(
            part, angles, NeuralMemoryState(memory, tail, seen), _bare(memory), None, (0,) * rows, None, None
        )
        return y, read, after.memory.weights, after.memory.momentum, after.tail

    def _recall(self, queries: Tensor, previous: MemoryState | None) -> Tensor:
        """h: what the memory of the previous segment's end knows about queries [B, n, H, D] -> [B, n, d_model].

        No gate and no output projection as in ``emit``: attention's own projections follow.
        """
        return self.context_norm(self.memory.read(queries, previous).flatten(2))

    def _always(self, plain: Tensor, previous: MemoryState | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values that every token of the segment sees: P, and the reads with learned queries."""
        tokens = []
        if self.persistent is not None:
            tokens.append(self.persistent.P.unsqueeze(0))
        if self.summary is not None:
            summary = self.summary.P.expand(plain.shape[0], -1, -1)
            queries = self.memory.normalise(self.context_query(summary))
            tokens.append(self._recall(queries, previous))
        if not tokens:
            return None
        rows = max(t.shape[0] for t in tokens)
        return plain, *self.attention.keys_values(torch.cat([t.expand(rows, -1, -1) for t in tokens], 1))


def _as_part_of_the_graph(training: bool, x: Tensor) -> Tensor:
    """``torch.compile`` starts again when an input ceases to need a gradient: in training all of them do."""
    x = x.contiguous()
    return x.detach().requires_grad_() if training and not x.requires_grad else x


@cache
def _compiled_segment() -> Callable:
    return torch.compile(MACMixer._whole_segment, dynamic=False)


def _at_segment_start(memory: NeuralMemoryState, part: tuple[Tensor, ...]) -> MACState:
    """The state of streams whose next token begins a segment; ``part`` tells the shape of keys and values."""
    nothing = AttentionCache(part[3][:, :0], part[4][:, :0])
    return MACState(memory, _bare(memory.memory), None, nothing, nothing)


def _bare(memory: MemoryState) -> MemoryState:
    """What a read of a memory at a chunk's end needs: its weights."""
    return replace(memory, momentum=(), chunk=None)


def _advance_previous(previous: MemoryState | None, now: MemoryState, closing: list[bool]) -> MemoryState:
    """The memory of the last segment's end: as it stands now for the rows whose segment just closed."""
    bare = _bare(now)
    if all(closing):
        return bare
    if previous is None:
        return bare.reset([i for i, closes in enumerate(closing) if not closes])
    if not any(closing):
        return previous
    rows = torch.tensor(closing, device=now.weights[0].device)
    weights = where_rows(rows, bare.weights, previous.weights)
    count = tuple(n if c else p for n, p, c in zip(bare.count, previous.count, closing, strict=True))
    return replace(bare, weights=weights, count=count)


def _join(pieces: list[Tensor], places: list[tuple[list[int], list[int]]], tokens: int) -> Tensor:
    """Segment outputs put back at their columns; ``places`` has each piece's first column and count per row."""
    rows = pieces[0].shape[0]
    index = torch.zeros(rows, tokens, dtype=torch.long)
    offset = 0
    for piece, (start, count) in zip(pieces, places, strict=True):
        for row, (first, real) in enumerate(zip(start, count, strict=True)):
            index[row, first : first + real] = offset + torch.arange(real)
        offset += piece.shape[1]
    return torch.cat(pieces, 1)[torch.arange(rows, device=pieces[0].device).unsqueeze(1), index.to(pieces[0].device)]
