"""Causal depthwise convolution with its tail carried along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titans.autograd import hand_written
from titans.layers.module import Module, hooked
from titans.ops.memory.native import around
from titans.ops.rows import Rows, columns, flags

OWN = 0.2  # share of a token itself in its key at the start


class _Depthwise(torch.autograd.Function):
    """y[:, t] = Σ_j w_j ⊙ padded[:, t + j] as shifted multiply-adds; autograd would zero-fill a tensor per shift."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(padded, weight)
        tokens = padded.shape[1] - weight.shape[0] + 1
        y = padded.new_empty(padded.shape[0], tokens, padded.shape[2])
        for start, end in _parts(padded, tokens):
            out = torch.mul(padded[:, start:end], weight[0], out=y[:, start:end])
            for j in range(1, weight.shape[0]):
                out.addcmul_(padded[:, start + j : end + j], weight[j])
        return y

    @staticmethod
    @hand_written
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        padded, weight = ctx.saved_tensors
        grad_padded, grad_weight = torch.zeros_like(padded), torch.zeros_like(weight)
        for start, end in _parts(padded, grad.shape[1]):
            part = grad[:, start:end]
            for j in range(weight.shape[0]):
                grad_padded[:, start + j : end + j].addcmul_(part, weight[j])
                grad_weight[j] += (part * padded[:, start + j : end + j]).sum((0, 1))
        return grad_padded, grad_weight


def _parts(x: Tensor, tokens: int) -> list[tuple[int, int]]:
    """Tokens to take at once: on a CPU so few that they stay in its cache from tap to tap."""
    size = 256 if x.device.type == "cpu" else tokens
    return [(start, min(start + size, tokens)) for start in range(0, tokens, max(size, 1))]


class ShortConvolution(Module):
    """y_t = Σ_j w_j ⊙ x_{t-K+1+j}: each channel mixes its own last K values (Titans §4.4).

    Args:
        channels: width of x.
        kernel: K ≥ 1.
    """

    def __init__(self, channels: int, kernel: int = 4):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel, channels))
        self.initialise()

    def initialise(self) -> None:
        nn.init.uniform_(self.weight, -(self.kernel**-0.5), self.kernel**-0.5)

    def forward(self, x: Tensor, tail: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x: [B, T, channels].
            tail: the last K - 1 inputs of each row's stream [B, K-1, channels]; None: all of them begin here.
            rows: where the rows stand.

        Returns:
            y [B, T, channels], and the new tail.
        """
        padded = torch.cat((self.start(x, tail, rows.seen).to(x.dtype), x), 1)
        weight = self.weight.to(x.dtype)
        after = columns(padded, rows.counts, self.kernel - 1)
        if not rows.starts:
            return _Depthwise.apply(padded, weight), after  # type: ignore[return-value]
        age = rows.positions(x.device).unsqueeze(-1)  # in its document; nothing reaches back beyond its first token
        back = (self.kernel - 1 - j for j in range(self.kernel))
        taps = (
            torch.where(age >= distance, padded[:, j : j + x.shape[1]], 0) * weight[j]
            for j, distance in enumerate(back)
        )
        distance = torch.arange(self.kernel - 1, 0, -1, device=x.device)
        read = torch.tensor(rows.after, device=x.device).unsqueeze(1)
        return sum(taps, start=x.new_zeros(())), after.masked_fill((distance > read).unsqueeze(-1), 0)

    def heads(
        self, x: Tensor, tail: Tensor | None, rows: Rows, kinds: Sequence[int], head_dim: int, longest: float = 1.0
    ) -> tuple[Tensor, ...] | None:
        """Convolve, and bring the heads to their lengths, in C++: see `titans.ops.memory.native.around.heads`.

        Returns:
            the parts, each [B, T, H, D], and the new tail; None where C++ cannot: `forward` can.
        """
        if type(self) is not ShortConvolution or hooked(self) or not rows.full or not around.usable(x, self.weight):
            return None
        if tail is not None:
            tail = self.start(x, tail, rows.seen).to(x.dtype)
        return around.heads(x, tail, self.weight, kinds, head_dim, longest)

    def start(self, like: Tensor, tail: Tensor | None, seen: tuple[int, ...]) -> Tensor:
        """The tail [B, K-1, channels] with zeros for the rows that begin a stream."""
        if tail is None:
            return like.new_zeros(len(seen), self.kernel - 1, self.weight.shape[1])
        return tail.masked_fill(flags([s == 0 for s in seen], tail), 0) if 0 in seen else tail


@torch.no_grad()
def start_keys_one_token_behind(queries: Tensor, keys: Tensor, conv: ShortConvolution | None) -> bool:
    """Let the key of a token start as the query of the token before it: an induction head to begin with.

    Queries and keys are projected alike, and the convolution of keys looks one token further back. What follows is thus
    filed under what came before it, and a query finds what once followed the like of the last tokens: the pattern that
    copying needs, and that training finds late (docs/results/lasting.md).

    Args:
        queries, keys: weights of the two projections, of the same shape.
        conv: of queries, keys and values side by side. Without a convolution of at least two tokens there is nothing to
            look back with, and nothing happens.

    Returns:
        whether it was done.
    """
    if conv is None or conv.kernel < 2:
        return False
    keys.copy_(queries)
    of_queries, of_keys, _ = conv.weight.chunk(3, -1)
    of_queries[0] = 0
    of_keys[:-1] = of_queries[1:]
    of_keys[-1] = OWN * of_queries[-1]  # not 0: a stream's first token has nothing else to be filed under
    return True
