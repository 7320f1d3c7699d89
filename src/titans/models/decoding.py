"""Decoding: a model's step of one token per row, in tensors whose shapes never change.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans.ops.place import Place
from titans.state import State

if TYPE_CHECKING:
    from titans.models.language_model import TitansModel
    from titans.models.state import ModelState


@dataclass(frozen=True)
class StepState(State):
    """What a `ModelState` holds, in buffers: one state per block, and the tokens read, int64 [B]."""

    layers: tuple[Any, ...]
    read: Tensor


def unstepped(model: TitansModel) -> str | None:
    """Why a model has no step of fixed shapes, as the end of a sentence; None where it has."""
    found = ((f"blocks.{i}", block.mixer.unstepped()) for i, block in enumerate(model.blocks))  # type: ignore[union-attr]
    return next((f"{name}: {reason}" for name, reason in found if reason is not None), None)


@torch.no_grad()
def begin_steps(model: TitansModel, state: ModelState) -> StepState:
    """A state in buffers, from which `step` goes on; rows that are fresh begin their streams.

    Raises:
        ValueError: the model has no such step.
    """
    if reason := unstepped(model):
        raise ValueError(f"this model has no step of fixed shapes: {reason}")
    layers = (block.mixer.begin_steps(old, state.seen) for block, old in zip(model.blocks, state.layers, strict=True))  # type: ignore[union-attr]
    return StepState(tuple(layers), state.read.clone())


def step(model: TitansModel, x: Tensor, state: StepState, place: Place) -> tuple[Tensor, StepState]:
    """Read one token of every row.

    Args:
        x: embeddings [B, 1, d_model].
        state: from `begin_steps` or the last step; given away where ``place`` says so.
        place: where the rows stand, at ``state.read``.

    Returns:
        what the head reads [B, 1, d_model], and the new state.
    """
    layers = []
    for block, old in zip(model.blocks, state.layers, strict=True):
        x, after = block.step(x, old, place)  # type: ignore[operator]
        layers.append(after)
    return model.norm(x), StepState(tuple(layers), place.after)


@torch.no_grad()
def end_steps(model: TitansModel, state: StepState) -> tuple[Any, ...]:
    """The layers of a `ModelState`: undo `begin_steps`."""
    seen = tuple(state.read.tolist())
    return tuple(
        block.mixer.end_steps(old, seen)  # type: ignore[union-attr]
        for block, old in zip(model.blocks, state.layers, strict=True)
    )
