"""Causal depthwise convolution with its tail carried along."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans.ops.place import Place
from titans.ops.ragged import columns


class ShortConvolution(nn.Module):
    """y_t = Σ_j w_j ⊙ x_{t-K+1+j}: each channel mixes its own last K values (Titans §4.4).

    Args:
        channels: width of x.
        kernel: K ≥ 1.
    """

    def __init__(self, channels: int, kernel: int = 4):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel, channels).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(self, x: Tensor, tail: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        """x [B, T, channels] and the last K - 1 inputs of each row [B, K-1, channels]; returns y and the new tail."""
        reach = self.kernel - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], reach, x.shape[2])
        elif 0 in place.seen:
            fresh = torch.tensor([s == 0 for s in place.seen], device=x.device)
            tail = tail.masked_fill(fresh.view(-1, 1, 1), 0)
        padded = torch.cat((tail.to(x.dtype), x), 1)
        tokens = x.shape[1]
        y = padded[:, :tokens] * self.weight[0]
        for j in range(1, self.kernel):
            y = torch.addcmul(y, padded[:, j : j + tokens], self.weight[j])
        return y, columns(padded, place.counts, reach)
