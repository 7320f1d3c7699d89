"""The mixers by variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from titans.layers.module import Module
from titans.ops.place import Place
from titans.state import State

MIXERS: dict[str, type[Mixer]] = {}


class Mixer(Module):
    """What distinguishes one variant of block from another.

    A mixer is built from a `TitansConfig` and called as ``mixer(x, state, rows, store)`` with normalised x
    [B, T, d_model] of a right-padded batch, the state that its last call returned (None: all streams begin here), where
    the rows stand, and [B, T] bool, False for tokens that a memory reads but does not write (None: all are written). It
    returns its output [B, T, d_model], which the block adds to the residual stream, and the new state, a
    `titans.state.State` of its own (a frozen dataclass). Defining the class is registering it.

    What mixes tokens must go by ``rows``: a row may be shorter than T, go on from the state or begin, and hold further
    documents, each of which begins anew. The parts (`titans.models.mixers.parts`: ``PrefixedMemory``,
    ``make_attention``) do when they are handed it, with their part of the state; what treats tokens one by one need
    not. `titans.models.mixers.mag` is the shortest mixer that has both.

    A mixer may also read one token at a time in fixed shapes (docs/decoding.md): then it overrides ``unstepped``,
    ``begin_steps``, ``step`` and ``end_steps``.

    Attributes:
        variants: names under which `TitansConfig.variant` knows it.
        has_memory: does it hold a `NeuralMemory`?
    """

    variants: ClassVar[tuple[str, ...]] = ()
    has_memory: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        names: Any = cls.__dict__.get("variants", ())  # not the parent's
        if not isinstance(names, tuple):
            raise TypeError(f'{cls.__name__}.variants must be a tuple such as ("MAC",), got {names!r}')
        for name in names:
            known = MIXERS.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"variant {name!r} is taken by {known.__name__}: choose another name")
            MIXERS[name] = cls

    def unstepped(self) -> str | None:
        """Why there is no step of fixed shapes, as the end of a sentence; None where there is."""
        return f"{type(self).__name__} defines none"

    def begin_steps(self, state: Any, seen: Sequence[int]) -> State:
        """A state in buffers of fixed shapes, a `State` of its own kind; ``seen``: tokens that each row has read."""
        raise NotImplementedError

    def step(self, x: Tensor, state: Any, place: Place) -> tuple[Tensor, State]:
        """One token x [B, 1, d_model] of every row: what a call does, with tensors for counts."""
        raise NotImplementedError

    def end_steps(self, state: Any, seen: Sequence[int]) -> State:
        """Undo ``begin_steps``; ``seen``: tokens read by now."""
        raise NotImplementedError
