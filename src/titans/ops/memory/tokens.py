"""What a memory reads: queries, keys, values and gates in one layout.

At the public door tensors are [B, T, H, ...]; behind it [G, T, ...], G = B·H rows (all heads of a sample side by side).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from titans.state import State

Gate = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Gates(State):
    """Per-token gates in their final range; ``eta`` or ``alpha`` None: that term is off.

    ``theta`` and ``alpha`` have one number per token and row, or with channel gates are tuples of one [..., out] per
    map; ``eta`` and ``write`` have one number per token and row. ``write`` is 1 where a token may write and 0 where it
    leaves weights and momentum untouched. Step sizes alone cannot say that: with θ = 0, α = 0, η = 1 the carried
    momentum would still be added to the weights. None: every token writes.
    """

    columns: ClassVar[int | None] = 2

    theta: Gate
    eta: Tensor | None
    alpha: Gate | None
    write: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Gates:
        """The same gates with ``change`` applied to every tensor."""
        return Gates(*(_each(gate, change) for gate in (self.theta, self.eta, self.alpha, self.write)))  # type: ignore[arg-type]

    def where(self, active: Tensor) -> Gates:
        """The same gates, neutral wherever ``active`` (bool, broadcastable to a gate) is False."""
        stored = active.to(self.plain.dtype).expand_as(self.plain)

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

    def storable(self) -> Gates:
        """The same gates with ``write`` spelt out, as states hold them."""
        write = torch.ones_like(self.plain) if self.write is None else self.write
        return Gates(self.theta, self.eta, self.alpha, write)

    def then(self, new: Gates) -> Gates:
        """These tokens followed by new ones, in the engines' layout.

        Raises:
            ValueError: a term is switched on or off, or gates change their kind, inside a chunk.
        """
        old, new = self.storable(), new.storable()
        pairs = ((old.theta, new.theta), (old.eta, new.eta), (old.alpha, new.alpha), (old.write, new.write))
        return Gates(*(_join(*pair) for pair in pairs))  # type: ignore[arg-type]

    @property
    def plain(self) -> Tensor:
        """A gate with one number per token and row, whichever kind of gates these are."""
        return self.theta[0][..., 0] if isinstance(self.theta, tuple) else self.theta


@dataclass(frozen=True)
class Tokens:
    """The tokens of a call.

    Attributes:
        q, k, v: [..., D].
        gates: θ, η, α and where writes are allowed.
        delta: learned Huber threshold, [..., 1] or [..., D]; None where the bias has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    delta: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same tokens with ``change`` applied to every tensor."""
        delta = None if self.delta is None else change(self.delta)
        return Tokens(change(self.q), change(self.k), change(self.v), self.gates.each(change), delta)

    def split(self, widths: Sequence[int]) -> list[Tokens]:
        """Consecutive parts. One split per tensor: a slice per part would make autograd fill a whole tensor each."""
        if len(widths) == 1:
            return [self]
        parts: dict[int, Sequence[Tensor]] = {}

        def part(number: int) -> Callable[[Tensor], Tensor]:
            def take(x: Tensor) -> Tensor:
                if id(x) not in parts:
                    parts[id(x)] = x.split(list(widths), 1)
                return parts[id(x)][number]

            return take

        return [self.each(part(number)) for number in range(len(widths))]


def _each(gate: Gate | None, change: Callable[[Tensor], Tensor]) -> Gate | None:
    if gate is None:
        return None
    return tuple(map(change, gate)) if isinstance(gate, tuple) else change(gate)


def _join(old: Gate | None, new: Gate | None) -> Gate | None:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True))
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return torch.cat((old, new), 1)
    if old is None and new is None:
        return None
    raise ValueError("eta and alpha must stay on or off, and gates per head or per channel, until a chunk is complete")
