"""Decoding: a model's step of one token per row, in tensors whose shapes never change.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from titans.layers.vectors import step_linear, step_norm
from titans.ops.place import Place
from titans.state import State

if TYPE_CHECKING:
    from titans.models.language_model import TitansModel
    from titans.models.state import ModelState


Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class StepState(State):
    """What a `ModelState` holds, in buffers: one state per block, and the tokens read, int64 [B]."""

    layers: tuple[Any, ...]
    read: Tensor


class Buffers:
    """A `StepState`, and the right to write into its tensors, which can be taken once.

    The first step that goes on from a state adds its columns in place, and the right is then that of the state after
    it. Whoever goes on from the same state later, or in another thread, gets copies.
    """

    def __init__(self, steps: StepState):
        self.steps, self._right = steps, [True]
        self.given = False

    def claim(self) -> bool:
        """Take the right to write into the buffers; False where it is gone."""
        try:
            return self._right.pop()  # in one step: of several threads one gets it
        except IndexError:
            return False

    def given_away(self) -> Buffers:
        """The same, of a state that nobody uses but the call that it is given to."""
        found = copy(self)
        found.given = True
        return found


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
    _check(model)
    pairs = zip(model.blocks, state.layers, strict=True)
    with torch.autocast(model.embedding.weight.device.type, enabled=False):  # calls without it may go on from there
        layers = [block.mixer.begin_steps(old, state.seen) for block, old in pairs]  # type: ignore[union-attr]
    # Strides are part of a graph, too, those of a batch of one included, which `contiguous` leaves as they are.
    new = StepState(tuple(layers), state.read.clone())
    return new.map(lambda x: x.clone(memory_format=torch.contiguous_format))


def step(model: TitansModel, x: Tensor, state: StepState, place: Place) -> tuple[Tensor, StepState]:
    """Read one token of every row.

    Args:
        x: embeddings [B, 1, d_model].
        state: from `begin_steps` or the last step; written into where ``place`` says so.
        place: where the rows stand, at ``state.read``.

    Returns:
        logits [B, 1, V], and the new state.
    """
    layers = []
    for block, old in zip(model.blocks, state.layers, strict=True):
        x, after = block.step(x, old, place)  # type: ignore[operator]
        layers.append(after)
    hidden = step_norm(model.norm, x, place)
    return step_linear(model.head, hidden, place), StepState(tuple(layers), place.after)


@torch.no_grad()
def end_steps(model: TitansModel, state: StepState) -> tuple[Any, ...]:
    """The layers of a `ModelState`: undo `begin_steps`."""
    seen = tuple(state.read.tolist())
    return tuple(
        block.mixer.end_steps(old, seen)  # type: ignore[union-attr]
        for block, old in zip(model.blocks, state.layers, strict=True)
    )


class DecodingStep(nn.Module):
    """A model's step as a function of tensors alone: to compile, to export, to capture.

    ``step = DecodingStep(model)``; ``state = begin_steps(model, model(prompt).state)``; then
    ``logits, state = step(token, state)`` for every token; ``end_steps`` makes a state of it again. Every call has the
    same shapes, and what differs from token to token is in tensors, so one graph serves all.

    Args:
        model: which has a step (`unstepped`).

    Raises:
        ValueError: it has none.
    """

    def __init__(self, model: TitansModel):
        super().__init__()
        _check(model)
        self.model = model

    def forward(self, input_ids: Tensor, state: StepState, active: Tensor | None = None) -> tuple[Tensor, StepState]:
        """Read one token of every row.

        Args:
            input_ids: int64 [B, 1].
            state: left as it is.
            active: bool [B], False for rows that take no token; None: all do.

        Returns:
            logits [B, 1, V], and the new state.
        """
        place = Place(state.read, active, input_ids.device)
        return step(self.model, self.model.embedding(input_ids), state, place)


def eager_from_a_state(forward: Call) -> Call:
    """Under ``torch.compile`` a call from a state, without gradients, runs as it is: what was read before decides its
    shapes, so each would be a graph of its own. `DecodingStep` is one for all tokens."""
    eager = torch.compiler.disable(forward)

    @wraps(forward)
    def call(self: Any, *args: Any, **given: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and given.get("state") is not None and not torch.is_grad_enabled():
            return eager(self, *args, **given)
        return forward(self, *args, **given)

    return cast(Call, call)


def _check(model: TitansModel) -> None:
    if reason := unstepped(model):
        raise ValueError(f"this model has no step of fixed shapes: {reason}")
