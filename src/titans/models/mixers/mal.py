"""Memory as a layer under sliding-window attention (Titans §4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans.layers.attention import AttentionState
from titans.layers.neural_memory import NeuralMemoryState
from titans.models.config import TitansConfig
from titans.models.mixers.parts import PrefixedMemory, make_attention
from titans.models.registry import Mixer
from titans.ops.rows import Rows
from titans.state import State


@dataclass(frozen=True)
class MALState(State):
    """Memory, attention and the memory's outputs at the persistent tokens [B, P, d_model]."""

    memory: NeuralMemoryState
    attention: AttentionState
    persistent: Tensor | None


class MALMixer(Mixer):
    """Memory as a layer: y = M([P‖x]), then sliding-window attention over y (Titans Eqs. 29-31)."""

    variants = ("MAL",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.norm = nn.RMSNorm(config.d_model)
        self.attention = make_attention(config, config.window, itself=config.window)

    def forward(self, x: Tensor, state: MALState | None, rows: Rows, store: Tensor | None) -> tuple[Tensor, MALState]:
        y, memory, first = self.branch(x, None if state is None else state.memory, rows, store)
        persistent = self._persistent(first, state, rows, y)
        before = None if state is None else state.attention
        out, attention = self.attention(self.norm(y), before, rows, persistent)
        return out, MALState(memory, attention, persistent)

    def _persistent(self, first: Tensor | None, state: MALState | None, rows: Rows, y: Tensor) -> Tensor | None:
        """The memory's outputs at the persistent tokens: new for rows that begin, the state's for the others."""
        if self.branch.persistent is None:
            return None
        if state is None or state.persistent is None:
            known = y.new_zeros(y.shape[0], self.branch.persistent.n_tokens, y.shape[2])
        else:
            known = state.persistent.to(y.dtype)  # the state may come from a call under autocast
        if first is None:
            return known
        begins = torch.tensor(rows.begins, device=y.device).view(-1, 1, 1)
        return torch.where(begins, self.norm(first).to(y.dtype), known)
