"""Persistent memory: learned tokens that hold what does not depend on the input (Titans §3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans.layers.gates import check_count
from titans.layers.module import Module


class PersistentMemory(Module):
    """``n_tokens`` learned vectors put before every sequence.

    Args:
        n_tokens: P ≥ 0.
        d_model: width.

    Source: Titans Eq. 19.
    """

    undecayed = ("P",)  # content, not a map

    def __init__(self, n_tokens: int, d_model: int):
        super().__init__()
        check_count("n_tokens", n_tokens, 0)
        check_count("d_model", d_model, 1)
        self.n_tokens = n_tokens
        self.P = nn.Parameter(torch.empty(n_tokens, d_model))
        self.initialise()

    def initialise(self) -> None:
        nn.init.normal_(self.P, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> [B, P + T, d_model]."""
        return torch.cat((self.P.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)

    def strip(self, x: Tensor) -> Tensor:
        """Remove the persistent positions again: [B, P + T, ...] -> [B, T, ...]; a ValueError where x is shorter."""
        if x.dim() < 2 or x.shape[1] < self.n_tokens:
            raise ValueError(f"x must be [B, {self.n_tokens} + T, ...], got {list(x.shape)}")
        return x[:, self.n_tokens :]

    def freeze(self) -> None:
        """Exclude the tokens from training."""
        self.P.requires_grad_(False)

    def unfreeze(self) -> None:
        """Train the tokens again."""
        self.P.requires_grad_(True)
