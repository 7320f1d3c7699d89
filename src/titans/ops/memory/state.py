"""The memory's state: immutable, exact wherever a text is cut, of bounded size.

Legend: B batch, H heads, p columns of the open chunk (at most C - 1), in/out widths of one map. Inside the engines the
first two dimensions are one, G = B·H.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from titans.miras import MirasConfig
from titans.miras.choice import BY_NAME
from titans.ops.memory.tokens import Gates
from titans.ops.rows import valid
from titans.state import State, check_rows, numbers

Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class OpenChunk(State):
    """The tokens of a chunk that has not closed yet, right-aligned per row: gradients as rank-one factors.

    ``inputs[i]`` [B, H, p, in] and ``errors[i]`` [B, H, p, out] of map i, at the chunk-start weights. How many of the p
    columns count for a row, its tokens in the chunk tell.
    """

    columns: ClassVar[int | None] = 2

    inputs: Maps
    errors: Maps
    gates: Gates

    @property
    def width(self) -> int:
        """p, the columns stored."""
        return self.errors[0].shape[-2]

    def only(self, counts: Sequence[int], width: int) -> OpenChunk:
        """In the engines' layout, ``width`` columns with nothing but the last ``counts[g]`` tokens of every row g."""
        chunk = self.each(lambda x: _last_columns(x, width)) if width != self.width else self
        if all(n == width for n in counts):
            return chunk
        real = ~valid([width - n for n in counts], width, self.errors[0].device)
        inputs, errors = (
            tuple(x.masked_fill(~real.unsqueeze(-1), 0) for x in side) for side in (chunk.inputs, chunk.errors)
        )
        return OpenChunk(inputs, errors, chunk.gates.where(real))

    def each(self, change: Callable[[Tensor], Tensor]) -> OpenChunk:
        """The same chunk with ``change`` applied to every tensor."""
        return OpenChunk(tuple(map(change, self.inputs)), tuple(map(change, self.errors)), self.gates.each(change))


def _last_columns(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[1]
    return torch.cat((x.new_zeros(x.shape[0], missing, *x.shape[2:]), x), 1) if missing > 0 else x[:, -missing:]


@dataclass(frozen=True)
class MemoryState(State):
    """(A, S) at the start of the open chunk, that chunk's tokens, and how many tokens each row has seen.

    Attributes:
        weights: A per map, [B, H, out, in] (vector memory: [B, H, D]).
        momentum: S per map, same shapes; empty without momentum.
        chunk: the open chunk's tokens.
        read: tokens seen, int64 [B]; 0 marks a fresh row, whose weights are taken from A_0 at the next call, wherever
            its stream stands.
        chunk_size: C, the chunk size that the state was made with.
        rule: what `rule_name` calls the rule that made it, where a public door did; inside models, which vouch for
            their states as a whole, it is empty.
    """

    static: ClassVar[tuple[str, ...]] = ("chunk_size", "rule")

    weights: Maps
    momentum: Maps
    chunk: OpenChunk
    read: Tensor
    chunk_size: int
    rule: str = ""

    @property
    def count(self) -> tuple[int, ...]:
        """Tokens seen, per row."""
        return numbers(self.read)

    def begun(self, seen: Sequence[int]) -> MemoryState:
        """In the engines' layout, with the open chunk of rows whose streams stand at ``seen``; fresh rows' is empty."""
        phases = [n % self.chunk_size for n in seen]
        counts = [p if n else 0 for p, n in zip(phases, self.count, strict=True)]
        return replace(self, chunk=self.chunk.only(counts, max(phases)))

    def each(self, change: Callable[[Tensor], Tensor], read: Tensor) -> MemoryState:
        """The same state with ``change`` applied to every tensor and other counts."""
        weights, momentum = tuple(map(change, self.weights)), tuple(map(change, self.momentum))
        return MemoryState(weights, momentum, self.chunk.each(change), read, self.chunk_size)


def rule_name(miras: MirasConfig) -> str:
    """The four choices by name, and a hash of all their settings but ``gates``, which may change between chunks."""
    told = json.dumps(miras.model_dump(mode="json", exclude={"gates"}, context=BY_NAME), sort_keys=True)
    names = (miras.architecture.name, miras.bias.name, miras.retention.name, miras.algorithm.name)
    return f"{'/'.join(names)} {hashlib.sha256(told.encode()).hexdigest()[:8]}"


def check_made_alike(state: MemoryState, chunk_size: int, rule: str) -> None:
    """Raise a ValueError unless ``state`` is sound and of this chunk size and rule; ``rule`` as `rule_name` has it."""
    check_rows(state)
    if state.chunk_size != chunk_size:
        raise ValueError(f"state was made with chunk_size {state.chunk_size}, this memory has {chunk_size}")
    if state.rule and state.rule != rule:
        raise ValueError(f"state was made by the rule {state.rule}, this memory has {rule}")
    longest = max((n % chunk_size for n in state.count), default=0)
    if not longest <= state.chunk.width < max(chunk_size, 1):
        raise ValueError(
            f"state.chunk holds {state.chunk.width} tokens of an open chunk, the rows have read {longest} of "
            f"{chunk_size}"
        )


@dataclass(frozen=True)
class StepMemory(State):
    """What a `MemoryState` holds, in tensors whose shapes never change.

    Attributes:
        weights, momentum: A and S per map at the open chunk's start, [B, H, out, in] (vector: [B, H, D]).
        used: W = φ(A) there; empty where A is itself replaced by it.
        tokens: the open chunk's tokens from column 0 on, [B, H, C, n]: a and δ of every map, θ, η, α, w.
        kernel: K_t[i] θ_i of the last token t, [B, H, C]; with momentum [B, H, C + 1], the last column m_t.
        push: L_t[i] θ_i likewise, [B, H, C + 1], the last column h_t; None without momentum.
        retained: P_t, [B, H, 1]; None without forgetting.
    """

    weights: Maps
    momentum: Maps
    used: Maps
    tokens: Tensor
    kernel: Tensor
    push: Tensor | None
    retained: Tensor | None


def memories(state: State) -> list[MemoryState | StepMemory]:
    """Every memory inside a state."""
    found: list[MemoryState | StepMemory] = []

    def visit(value: object) -> None:
        if isinstance(value, MemoryState | StepMemory):
            found.append(value)
        elif isinstance(value, State):
            for part in vars(value).values():
                visit(part)

    visit(state)
    return found


def check_finite(states: Sequence[State | None], names: Sequence[str], read: Tensor | None = None) -> None:
    """Stop at the call in which a memory diverged, as the verbatim rules can on a text that repeats itself.

    Looks at the weights of every memory inside ``states``, but only while no gradients are recorded: in training the
    loss tells, and on an accelerator a look means to wait: all are looked at together.

    Args:
        states, names: of the layers.
        read: tokens read per row, where the states do not say.

    Raises:
        FloatingPointError: gives the first one's name.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    found = [(name, memory) for name, s in zip(names, states, strict=True) if s is not None for memory in memories(s)]
    if not found:
        return
    # A sum is several times faster than a look at every weight; one that overflows is no proof yet.
    sums = torch.stack([sum((w.sum() for w in memory.weights), start=torch.zeros(())).float() for _, memory in found])
    for (name, memory), total in zip(found, sums.tolist(), strict=True):
        if not math.isfinite(total) and not all(bool(torch.isfinite(w).all()) for w in memory.weights):
            count = memory.read if isinstance(memory, MemoryState) else read
            assert count is not None
            raise FloatingPointError(
                f"the memory of {name} diverged within {int(count.max())} tokens: its weights are "
                "no longer finite. MirasConfig.steady() keeps the weights of any text bounded; a smaller "
                "theta_max or smaller inputs may help"
            )
