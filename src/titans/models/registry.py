"""The mixers by variant."""

from __future__ import annotations

from typing import ClassVar

from titans.layers.module import Module

MIXERS: dict[str, type[Mixer]] = {}


class Mixer(Module):
    """What distinguishes one variant of block from another.

    A mixer is built from a `TitansConfig` and called as ``mixer(x, state, rows, store)`` with normalised x
    [B, T, d_model] of a right-padded batch, the state that its last call returned (None: all streams begin here), where
    the rows stand, and [B, T] bool, False for tokens that a memory reads but does not write (None: all are written). It
    returns its output [B, T, d_model] and the new state. Defining the class is registering it.

    Attributes:
        variants: names under which `TitansConfig.variant` knows it.
        has_memory: does it hold a `NeuralMemory`?
    """

    variants: ClassVar[tuple[str, ...]] = ()
    has_memory: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        for name in cls.variants:
            known = MIXERS.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"variant {name!r} is taken by {known.__name__}: choose another name")
            MIXERS[name] = cls
