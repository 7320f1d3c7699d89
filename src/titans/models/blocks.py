"""The block around every mixer."""

from __future__ import annotations

from torch import Tensor

from titans.layers.feedforward import FeedForward
from titans.layers.module import Module, RMSNorm
from titans.layers.vectors import step_feedforward, step_norm
from titans.models.config import TitansConfig
from titans.models.registry import MIXERS
from titans.ops.place import Place
from titans.ops.rows import Rows
from titans.state import State


class Block(Module):
    """x + mixer(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: TitansConfig, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model)
        self.mixer = MIXERS[config.mixer(layer)](config.of_block(layer))
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = FeedForward(config.d_model, config.ffn_mult, gain=config.residual_gain)

    def forward(self, x: Tensor, state: State | None, rows: Rows, store: Tensor | None) -> tuple[Tensor, State]:
        """One block over x [B, T, d_model] of a right-padded batch.

        Args:
            x: the residual stream.
            state: what this block's last call returned; None: all streams begin here.
            rows: where the rows stand.
            store: [B, T] bool, False for tokens that the memory reads but does not write; None: all are written.
        """
        mixed, after = self.mixer(self.mixer_norm(x), state, rows, store)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), after

    def step(self, x: Tensor, state: State, place: Place) -> tuple[Tensor, State]:
        """One token x [B, 1, d_model] of every row, in fixed shapes; ``state`` from the mixer's ``begin_steps``."""
        mixed, after = self.mixer.step(step_norm(self.mixer_norm, x, place), state, place)
        return step_feedforward(self.ffn_norm, self.ffn, x + mixed, place), after
