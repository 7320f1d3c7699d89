"""Persistent memory: learned tokens that hold what does not depend on the input (Titans §3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PersistentMemory(nn.Module):
    """``n_tokens`` learned vectors put before every sequence.

    Args:
        n_tokens: P ≥ 0.
        d_model: width.

    Source: Titans Eq. 19.
    """

    def __init__(self, n_tokens: int, d_model: int):
        super().__init__()
        if n_tokens < 0:
            raise ValueError(f"n_tokens must be at least 0, got {n_tokens}")
        self.n_tokens = n_tokens
        self.P = nn.Parameter(0.02 * torch.randn(n_tokens, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> [B, P + T, d_model]."""
        return torch.cat((self.P.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)

    def strip(self, x: Tensor) -> Tensor:
        """Remove the persistent positions again: [B, P + T, ...] -> [B, T, ...]."""
        return x[:, self.n_tokens :]

    def freeze(self) -> None:
        """Exclude the tokens from training."""
        self.P.requires_grad_(False)

    def unfreeze(self) -> None:
        """Train the tokens again."""
        self.P.requires_grad_(True)
