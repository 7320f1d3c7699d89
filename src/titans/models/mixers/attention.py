"""The baselines: attention without a memory."""

from __future__ import annotations

from torch import Tensor

from titans.layers.attention import AttentionState
from titans.models.config import TitansConfig
from titans.models.mixers.parts import make_attention
from titans.models.registry import Mixer
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
