"""The memory alone (Titans §4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans.layers.neural_memory import NeuralMemoryState
from titans.models.config import TitansConfig
from titans.models.mixers.parts import PrefixedMemory
from titans.models.registry import Mixer
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
