"""Causal depthwise convolution with its tail carried along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans.ops.place import Place
from titans.ops.ragged import columns


class _Depthwise(torch.autograd.Function):
    """y[:, t] = Σ_j w_j ⊙ padded[:, t + j] as shifted multiply-adds; autograd would zero-fill a tensor per shift."""

    @staticmethod
    def forward(padded: Tensor, weight: Tensor) -> Tensor:
        tokens = padded.shape[1] - weight.shape[0] + 1
        y = padded[:, :tokens] * weight[0]
        for j in range(1, weight.shape[0]):
            y.addcmul_(padded[:, j : j + tokens], weight[j])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        padded, weight = ctx.saved_tensors
        tokens = grad.shape[1]
        grad_padded, grad_weight = torch.zeros_like(padded), torch.empty_like(weight)
        for j in range(weight.shape[0]):
            grad_padded[:, j : j + tokens].addcmul_(grad, weight[j])
            grad_weight[j] = (grad * padded[:, j : j + tokens]).sum((0, 1))
        return grad_padded, grad_weight


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
        padded = torch.cat((self.start(x, tail, place.seen).to(x.dtype), x), 1)
        y = _Depthwise.apply(padded, self.weight.to(x.dtype))
        return y, columns(padded, place.counts, self.kernel - 1)

    def start(self, like: Tensor, tail: Tensor | None, seen: tuple[int, ...]) -> Tensor:
        """The tail [B, K-1, channels] with zeros for the rows that begin a stream."""
        if tail is None:
            return like.new_zeros(len(seen), self.kernel - 1, self.weight.shape[1])
        if 0 not in seen:
            return tail
        fresh = torch.tensor([s == 0 for s in seen], device=tail.device)
        return tail.masked_fill(fresh.view(-1, 1, 1), 0)
