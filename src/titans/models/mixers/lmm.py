"""The memory alone (Titans §4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.layers.decoding import StepNeuralMemory
from titans.layers.neural_memory import NeuralMemoryState
from titans.models.config import TitansConfig
from titans.models.mixers.parts import PrefixedMemory
from titans.models.registry import Mixer
from titans.ops.place import Place
from titans.ops.rows import Rows


class LMMMixer(Mixer):
    """The memory over [P‖x] is the only mixer."""

    variants = ("LMM",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.gain = config.residual_gain
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        self.branch.memory.out.weight.mul_(self.gain)  # nothing else stands between the memory and the stream

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, rows: Rows, store: Tensor | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        y, after, _ = self.branch(x, state, rows, store)
        return y, after

    def unstepped(self) -> str | None:
        return self.branch.unstepped()

    def begin_steps(self, state: NeuralMemoryState, seen: Sequence[int]) -> StepNeuralMemory:
        return self.branch.begin_steps(state, seen)[0]

    def step(self, x: Tensor, state: StepNeuralMemory, place: Place) -> tuple[Tensor, StepNeuralMemory]:
        return self.branch.step(x, state, place)

    def end_steps(self, state: StepNeuralMemory, seen: Sequence[int]) -> NeuralMemoryState:
        return self.branch.end_steps(state, seen)
