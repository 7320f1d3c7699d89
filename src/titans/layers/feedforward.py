"""The SwiGLU feed-forward that follows every mixer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titans.layers.module import Linear, Module
from titans.ops.memory.native import around


class FeedForward(Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x), with the parameters of a two-matrix layer ``mult`` times as wide as the model.

    Args:
        d_model: width of x.
        mult: the hidden width is 2/3 of mult · d_model, rounded up to a multiple of 8.
        gain: of the last map at the start.
    """

    def __init__(self, d_model: int, mult: float = 4, gain: float = 1.0):
        super().__init__()
        hidden = -(-max(int(2 * mult * d_model / 3), 1) // 8) * 8
        self.up = Linear(d_model, 2 * hidden)
        self.down = Linear(hidden, d_model, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        both = self.up(x)
        if both.numel() and around.usable(both):
            return self.down(around.swiglu(both))
        gate, up = both.chunk(2, -1)
        return self.down(F.silu(gate) * up)
