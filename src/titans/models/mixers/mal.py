"""Memory as a layer under sliding-window attention (Titans §4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.layers.attention import AttentionState
from titans.layers.decoding import StepAttention, StepNeuralMemory, begin_attention, end_attention, step_attention
from titans.layers.module import RMSNorm
from titans.layers.neural_memory import NeuralMemoryState
from titans.layers.vectors import step_norm
from titans.models.config import TitansConfig
from titans.models.mixers.parts import PrefixedMemory, make_attention
from titans.models.registry import Mixer
from titans.ops.place import Place
from titans.ops.rows import Rows
from titans.state import State


@dataclass(frozen=True)
class MALState(State):
    """Memory, attention and the memory's outputs at the persistent tokens [B, P, d_model]."""

    memory: NeuralMemoryState
    attention: AttentionState
    persistent: Tensor | None


@dataclass(frozen=True)
class StepMAL(State):
    """`MALState` in buffers of fixed shapes."""

    memory: StepNeuralMemory
    attention: StepAttention
    persistent: Tensor | None


class MALMixer(Mixer):
    """Memory as a layer: y = M([P‖x]), then sliding-window attention over y (Titans Eqs. 29-31)."""

    variants = ("MAL",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.norm = RMSNorm(config.d_model)
        self.attention = make_attention(config, config.window, itself=config.window)

    def forward(self, x: Tensor, state: MALState | None, rows: Rows, store: Tensor | None) -> tuple[Tensor, MALState]:
        y, memory, first = self.branch(x, None if state is None else state.memory, rows, store)
        persistent = self._persistent(first, state, rows.begins, y)
        before = None if state is None else state.attention
        out, attention = self.attention(self.norm(y), before, rows, persistent)
        return out, MALState(memory, attention, persistent)

    def _persistent(
        self, first: Tensor | None, state: MALState | None, begins: Sequence[bool], y: Tensor
    ) -> Tensor | None:
        """The memory's outputs at the persistent tokens: new for rows that begin, the state's for the others."""
        if self.branch.persistent is None:
            return None
        if state is None or state.persistent is None:
            known = y.new_zeros(y.shape[0], self.branch.persistent.n_tokens, y.shape[2])
        else:
            known = state.persistent.to(y.dtype)  # the state may come from a call under autocast
        if first is None:
            return known
        return torch.where(torch.tensor(begins, device=y.device).view(-1, 1, 1), self.norm(first).to(y.dtype), known)

    def unstepped(self) -> str | None:
        return self.branch.unstepped()

    def begin_steps(self, state: MALState, seen: Sequence[int]) -> StepMAL:
        memory, first = self.branch.begin_steps(state.memory, seen)
        like = self.branch.memory.out.weight.new_zeros(len(seen), 1, self.norm.weight.shape[0])
        persistent = self._persistent(first, state, [not n for n in seen], like)
        return StepMAL(memory, begin_attention(self.attention, state.attention, seen, persistent), persistent)

    def step(self, x: Tensor, state: StepMAL, place: Place) -> tuple[Tensor, StepMAL]:
        y, memory = self.branch.step(x, state.memory, place)
        out, attention = step_attention(self.attention, step_norm(self.norm, y, place), state.attention, place)
        return out, StepMAL(memory, attention, state.persistent)

    def end_steps(self, state: StepMAL, seen: Sequence[int]) -> MALState:
        memory = self.branch.end_steps(state.memory, seen)
        return MALState(memory, end_attention(self.attention, state.attention, seen), state.persistent)
