"""Memory as a gate on sliding-window attention (Titans §4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
class MAGState(State):
    """Memory and attention of one layer."""

    memory: NeuralMemoryState
    attention: AttentionState


@dataclass(frozen=True)
class StepMAG(State):
    """`MAGState` in buffers of fixed shapes."""

    memory: StepNeuralMemory
    attention: StepAttention


class MAGMixer(Mixer):
    """Memory as a gate: o = y ⊗ σ(m) + a ⊗ y + b ⊗ m with y = n1(SWA([P‖x])) and m = n2(M([P‖x])) (Titans Eqs. 26-28).

    The paper leaves σ open. SiLU it is: a sigmoid lets the memory only damp what attention found, and costs 0.075
    bits per byte (docs/results/lasting.md). The paper has the product alone. a and b, learned from 1 on, let each
    branch pass by itself: what the memory recalls, and attention has not found, would otherwise be multiplied with
    whatever attention found instead (docs/results/evidence.md).
    """

    variants = ("MAG",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.attention = make_attention(config, config.window)
        self.attention_norm = RMSNorm(config.d_model)
        self.memory_norm = RMSNorm(config.d_model)
        self.attention_through = nn.Parameter(torch.empty(config.d_model))
        self.memory_through = nn.Parameter(torch.empty(config.d_model))
        self.initialise()

    def initialise(self) -> None:
        nn.init.ones_(self.attention_through)
        nn.init.ones_(self.memory_through)

    def forward(self, x: Tensor, state: MAGState | None, rows: Rows, store: Tensor | None) -> tuple[Tensor, MAGState]:
        read, memory, _ = self.branch(x, None if state is None else state.memory, rows, store)
        y, attention = self.attention(x, None if state is None else state.attention, rows, self._always())
        return self._gate(self.attention_norm(y), self.memory_norm(read)), MAGState(memory, attention)

    def _gate(self, y: Tensor, read: Tensor) -> Tensor:
        return y * (F.silu(read) + self.attention_through) + read * self.memory_through

    def _always(self) -> Tensor | None:
        return None if self.branch.persistent is None else self.branch.persistent.P.unsqueeze(0)

    def unstepped(self) -> str | None:
        return self.branch.unstepped()

    def begin_steps(self, state: MAGState, seen: Sequence[int]) -> StepMAG:
        memory, _ = self.branch.begin_steps(state.memory, seen)
        return StepMAG(memory, begin_attention(self.attention, state.attention, seen, self._always()))

    def step(self, x: Tensor, state: StepMAG, place: Place) -> tuple[Tensor, StepMAG]:
        read, memory = self.branch.step(x, state.memory, place)
        y, attention = step_attention(self.attention, x, state.attention, place)
        y, read = step_norm(self.attention_norm, y, place), step_norm(self.memory_norm, read, place)
        return self._gate(y, read), StepMAG(memory, attention)

    def end_steps(self, state: StepMAG, seen: Sequence[int]) -> MAGState:
        return MAGState(self.branch.end_steps(state.memory, seen), end_attention(self.attention, state.attention, seen))
