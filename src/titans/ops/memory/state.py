"""The memory's state: immutable, exact wherever a text is cut, of bounded size.

Legend: B batch, H heads, p tokens of the open chunk (at most C - 1), in/out widths of one map.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from titans.ops.ragged import valid

T = TypeVar("T", bound="State")


@dataclass(frozen=True)
class State:
    """Base of every state: a frozen tree of tensors whose first dimension is the batch.

    A tuple of integers holds one count per row: tokens seen, 0 for a fresh row. Plain integers, so that no step ever
    waits for an accelerator to learn where it stands.
    """

    def map(self: T, change: Callable[[Tensor], Tensor]) -> T:
        """The same state with ``change`` applied to every tensor."""
        return _map(self, change)

    def detach(self: T) -> T:
        """Cut the state off the graph: truncated back-propagation starts here."""
        return self.map(Tensor.detach)

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """Move every tensor, as ``Tensor.to``."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def select(self: T, rows: Sequence[int] | Tensor) -> T:
        """Keep these rows of the batch, in this order; a row may be repeated.

        Raises:
            ValueError: a row outside the batch, or a bool mask instead of row numbers.
        """
        return _select(self, torch.tensor(_row_numbers(rows, _batch(self)), dtype=torch.long))

    def reset(self: T, rows: Sequence[int] | Tensor) -> T:
        """Mark these rows fresh: at the next call they start a new stream, as if nothing had been read.

        Raises:
            ValueError: a row outside the batch, or a bool mask instead of row numbers.
        """
        return _reset(self, frozenset(_row_numbers(rows, _batch(self))))

    def put(self: T, rows: Sequence[int], new: T) -> T:
        """The same state with its ``rows`` taken from ``new``, whose row i becomes ``rows[i]``.

        Both must hold tensors of the same shapes, apart from the batch.

        Raises:
            ValueError: one holds a part that the other lacks.
        """
        return _put(self, new, tuple(rows))


def _put(value: Any, new: Any, rows: tuple[int, ...]) -> Any:
    if (value is None) != (new is None):
        raise ValueError("put needs two states that hold the same parts, got one with and one without a tensor")
    if isinstance(value, Tensor):
        return value.index_copy(0, torch.tensor(rows, device=value.device), new.to(value.dtype))
    if isinstance(value, tuple):
        if value and all(isinstance(item, int) for item in value):
            taken = dict(zip(rows, new, strict=True))
            return tuple(taken.get(i, n) for i, n in enumerate(value))
        return tuple(_put(a, b, rows) for a, b in zip(value, new, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f.name for f in dataclasses.fields(value))
        return type(value)(**{name: _put(getattr(value, name), getattr(new, name), rows) for name in fields})
    return value


def _row_numbers(rows: Sequence[int] | Tensor, batch: int) -> list[int]:
    index = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).flatten()
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise ValueError(f"rows must be row numbers, got {index.dtype}")
    for row in index.tolist():
        if not 0 <= row < batch:
            raise ValueError(f"rows must lie in 0..{batch - 1}, got {row}")
    return [int(row) for row in index.tolist()]


def _batch(value: Any) -> int:
    """Rows of the batch; 0 for what holds neither a count nor a tensor."""
    if isinstance(value, Tensor):
        return value.shape[0]
    if isinstance(value, tuple):
        if value and all(isinstance(item, int) for item in value):
            return len(value)
        return max((_batch(item) for item in value), default=0)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return max((_batch(getattr(value, f.name)) for f in dataclasses.fields(value)), default=0)
    return 0


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _map(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


def _reset(value: Any, rows: frozenset[int]) -> Any:
    if isinstance(value, tuple):
        if value and all(isinstance(item, int) for item in value):
            return tuple(0 if i in rows else n for i, n in enumerate(value))
        return tuple(_reset(item, rows) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _reset(getattr(value, f.name), rows) for f in dataclasses.fields(value)})
    return value


def _select(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device))
    if isinstance(value, tuple):
        if value and all(isinstance(item, int) for item in value):
            return tuple(value[i] for i in index.tolist())
        return tuple(_select(item, index) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _select(getattr(value, f.name), index) for f in dataclasses.fields(value)})
    return value


Gate = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Gates(State):
    """Per-token gates in their final range; ``eta`` or ``alpha`` None: that term is off.

    ``theta`` and ``alpha`` are [B, H, tokens], or per map [B, H, tokens, out] with channel gates; ``eta`` and ``write``
    are [B, H, tokens]. ``write`` is 1 where a token may write and 0 where it leaves weights and momentum untouched.
    Step sizes alone cannot say that: with θ = 0, α = 0, η = 1 the carried momentum would still be added to the weights.
    None: every token writes.
    """

    theta: Gate
    eta: Tensor | None
    alpha: Gate | None
    write: Tensor | None

    def where(self, active: Tensor) -> Gates:
        """The same gates, neutral wherever ``active`` (bool, [B, H, tokens] or broadcastable) is False."""
        like = _token_gate(self)
        stored = active.to(like.dtype).expand_as(like)

        def neutral(gate: Gate) -> Gate:
            if isinstance(gate, tuple):
                return tuple(g.masked_fill(~active.unsqueeze(-1), 0) for g in gate)
            return gate.masked_fill(~active, 0)

        return Gates(
            neutral(self.theta),
            None if self.eta is None else self.eta.masked_fill(~active, 1),
            None if self.alpha is None else neutral(self.alpha),
            stored if self.write is None else stored * self.write,
        )

    def then(self, new: Gates) -> Gates:
        """These tokens followed by new ones, in the engines' layout: the second dimension counts tokens."""
        write = None
        if self.write is not None or new.write is not None:
            write = torch.cat([torch.ones_like(_token_gate(g)) if g.write is None else g.write for g in (self, new)], 1)
        joined = (_join(a, b) for a, b in ((self.theta, new.theta), (self.eta, new.eta), (self.alpha, new.alpha)))
        return Gates(*joined, write)  # type: ignore[arg-type]


def _join(old: Gate | None, new: Gate | None) -> Gate | None:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True))
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return torch.cat((old, new), 1)
    if old is None and new is None:
        return None
    raise ValueError("eta and alpha must stay on or off, and gates per head or per channel, until a chunk is complete")


def _token_gate(gates: Gates) -> Tensor:
    """A gate with one number per token and head, whichever kind of gates these are."""
    return gates.theta[0][..., 0] if isinstance(gates.theta, tuple) else gates.theta


@dataclass(frozen=True)
class OpenChunk(State):
    """The tokens of a chunk that has not closed yet, right-aligned per row: gradients as rank-one factors.

    ``inputs[i]`` [B, H, p, in] and ``errors[i]`` [B, H, p, out] of map i, at the chunk-start weights.
    """

    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    gates: Gates

    @property
    def width(self) -> int:
        """p, the columns stored."""
        return self.inputs[0].shape[-2]

    def only(self, phases: Sequence[int]) -> OpenChunk:
        """The chunk with everything but the last ``phases[b]`` tokens of row b made empty."""
        width = self.width
        if all(p == width for p in phases):
            return self
        empty = valid([width - p for p in phases], width, self.inputs[0].device)
        empty = empty.view(empty.shape[:1] + (1,) * (self.inputs[0].dim() - 3) + (width,))

        def clear(x: Tensor) -> Tensor:
            return x.masked_fill(empty.unsqueeze(-1), 0)

        return OpenChunk(tuple(map(clear, self.inputs)), tuple(map(clear, self.errors)), self.gates.where(~empty))


@dataclass(frozen=True)
class MemoryState(State):
    """(A, S) at the start of the open chunk, that chunk's tokens, and how many tokens each row has seen.

    Attributes:
        weights: A per map, [B, H, out, in] (vector memory: [B, H, D]).
        momentum: S per map, same shapes; empty without momentum.
        chunk: the open chunk's tokens, or None when every row stands at a chunk's start.
        count: tokens seen, per row; 0 marks a fresh row, whose weights are taken from A_0 at the next call.
        chunk_size: C, the chunk size that the state was made with.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    chunk: OpenChunk | None
    count: tuple[int, ...]
    chunk_size: int

    @property
    def phases(self) -> tuple[int, ...]:
        """Tokens in the open chunk, per row."""
        return tuple(count % self.chunk_size for count in self.count)


def check_finite(state: State, name: str) -> None:
    """Stop at the call in which a memory diverged, as the verbatim rules can on a text that repeats itself.

    Looks at the weights of every ``MemoryState`` inside ``state``, but only while no gradients are recorded: in
    training the loss tells, and on an accelerator a look means to wait.

    Raises:
        FloatingPointError: names the layer ``name``.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    memories = list(_memories(state))
    # A sum is several times faster than a look at every weight; one that overflows is no proof yet.
    suspects = [w for m in memories for w in m.weights if not math.isfinite(w.sum())]
    if not all(bool(torch.isfinite(w).all()) for w in suspects):
        raise FloatingPointError(
            f"the memory of {name} diverged within {max(max(m.count) for m in memories)} tokens: its weights are "
            "no longer finite. MirasConfig.steady() keeps the weights of any text bounded; a smaller "
            "theta_max or smaller inputs may help"
        )


def _memories(state: Any) -> Iterator[MemoryState]:
    if isinstance(state, MemoryState):
        yield state
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from _memories(getattr(state, field.name))
