"""The SwiGLU feed-forward that follows every mixer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x), with the parameters of a two-matrix layer ``mult`` times as wide as the model.

    Args:
        d_model: width of x.
        mult: the hidden width is 2/3 of mult · d_model, rounded up to a multiple of 8.
    """

    def __init__(self, d_model: int, mult: float = 4):
        super().__init__()
        hidden = -(-int(2 * mult * d_model / 3) // 8) * 8
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
