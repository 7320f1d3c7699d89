"""Memory as a gate on sliding-window attention (Titans §4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.attention import AttentionState
from titans.layers.neural_memory import NeuralMemoryState
from titans.models.config import TitansConfig
from titans.models.mixers.parts import PrefixedMemory, make_attention
from titans.models.registry import Mixer
from titans.ops.rows import Rows
from titans.state import State


@dataclass(frozen=True)
class MAGState(State):
    """Memory and attention of one layer."""

    memory: NeuralMemoryState
    attention: AttentionState


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
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.memory_norm = nn.RMSNorm(config.d_model)
        self.attention_through = nn.Parameter(torch.empty(config.d_model))
        self.memory_through = nn.Parameter(torch.empty(config.d_model))
        self.initialise()

    def initialise(self) -> None:
        nn.init.ones_(self.attention_through)
        nn.init.ones_(self.memory_through)

    def forward(self, x: Tensor, state: MAGState | None, rows: Rows, store: Tensor | None) -> tuple[Tensor, MAGState]:
        read, memory, _ = self.branch(x, None if state is None else state.memory, rows, store)
        always = self.branch.persistent.P.unsqueeze(0) if self.branch.persistent else None
        y, attention = self.attention(x, None if state is None else state.attention, rows, always)
        y, read = self.attention_norm(y), self.memory_norm(read)
        o = y * (F.silu(read) + self.attention_through) + read * self.memory_through
        return o, MAGState(memory, attention)
