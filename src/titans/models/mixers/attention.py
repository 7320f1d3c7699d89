"""The baselines: attention without a memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from titans.layers.attention import AttentionState
from titans.layers.decoding import StepAttention, begin_attention, end_attention, step_attention
from titans.models.config import TitansConfig
from titans.models.mixers.parts import make_attention
from titans.models.registry import Mixer
from titans.ops.place import Place
from titans.ops.rows import Rows


class AttentionMixer(Mixer):
    """Full causal attention ("transformer"), or a sliding window ("swa")."""

    variants = ("transformer", "swa")
    has_memory = False

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.attention = make_attention(config, config.window if config.variant == "swa" else None)

    def forward(
        self, x: Tensor, state: AttentionState | None, rows: Rows, store: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        return self.attention(x, state, rows)

    def unstepped(self) -> str | None:
        return "full attention keeps the keys of all tokens" if self.attention.window is None else None

    def begin_steps(self, state: AttentionState, seen: Sequence[int]) -> StepAttention:
        return begin_attention(self.attention, state, seen)

    def step(self, x: Tensor, state: StepAttention, place: Place) -> tuple[Tensor, StepAttention]:
        return step_attention(self.attention, x, state, place)

    def end_steps(self, state: StepAttention, seen: Sequence[int]) -> AttentionState:
        return end_attention(self.attention, state, seen)
