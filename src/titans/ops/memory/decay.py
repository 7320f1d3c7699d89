"""K, P and m of the dual form: what the gates alone contribute to a chunk (math.md §3).

Legend: G batch times heads, t and i token positions inside a chunk of C tokens, t the later one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Decay:
    """How the weights right after token t depend on the chunk's start and on the write of token i.

    W_t = retained_t W_0 + pushed_t S_0 - Σ_i kernel[t, i] δ_i a_iᵀ
    S_C = carried S_0 - Σ_i momentum_kernel[i] δ_i a_iᵀ

    Attributes:
        kernel: K[t, i] θ_i, [..., C, C].
        retained: P_t, [..., C, 1]; None without forgetting (P = 1).
        pushed: m_t, [..., C, 1]; None without momentum.
        carried: h_C, [..., 1, 1]; None without momentum.
        momentum_kernel: Lη[C, i] θ_i, [..., C, 1]; None without momentum.
    """

    kernel: Tensor
    retained: Tensor | None
    pushed: Tensor | None
    carried: Tensor | None
    momentum_kernel: Tensor | None


class _CumulativeProducts(torch.autograd.Function):
    """L[t, i] = Π_{j=i+1..t} g_j with a backward that is one small matrix product.

    ∂L[t, i]/∂g_j = L[t, j] L[j-1, i], so the gradient of g_j is Σ_i (Lᵀ G)[j, i] L[j-1, i]: no division, hence exact at
    gates of 0, where autograd's rule for a cumulative product has to take a slow path.
    """

    @staticmethod
    def forward(gates: Tensor) -> Tensor:
        size = gates.shape[-1]
        below = torch.ones(size, size, dtype=torch.bool, device=gates.device).tril(-1)
        return torch.where(below, gates.unsqueeze(-1), 1).cumprod(-2).tril()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (products,) = ctx.saved_tensors
        reached = products.mT @ grad.tril()
        return F.pad((reached[..., 1:, :] * products[..., :-1, :]).sum(-1), (1, 0))


def cumulative_products(gates: Tensor) -> Tensor:
    """L[t, i] = Π_{j=i+1..t} g_j for i ≤ t, else 0; [..., C] -> [..., C, C].

    A masked cumulative product is exact, with the right gradients, at gates of 0 and 1; a cumulative sum of logarithms
    gives NaN there, and a quotient of cumulative products underflows.
    """
    return _CumulativeProducts.apply(gates)  # type: ignore[return-value]


def chunk_decay(theta: Tensor, eta: Tensor | None, alpha: Tensor | None, write: Tensor | None) -> Decay:
    """Decay factors of one or many chunks.

    Args:
        theta, eta, alpha: gates [..., C]; eta or alpha None switches that term off.
        write: [..., C], 0 where the weights stay untouched; None: every token writes.
    """
    size = theta.shape[-1]
    if alpha is None:
        forget = torch.ones(size, size, dtype=theta.dtype, device=theta.device).tril()
        retained = None
    else:
        forget = cumulative_products(1 - alpha)
        retained = forget[..., :1] * (1 - alpha[..., :1]).unsqueeze(-1)
    if eta is None:
        return Decay(forget * theta.unsqueeze(-2), retained, None, None, None)
    if write is not None:
        forget = forget * write.unsqueeze(-2)
    momentum = cumulative_products(eta)
    decayed = momentum[..., :1] * eta[..., :1].unsqueeze(-1)
    return Decay(
        kernel=(forget @ momentum) * theta.unsqueeze(-2),
        retained=retained,
        pushed=forget @ decayed,
        carried=decayed[..., -1:, :],
        momentum_kernel=(momentum[..., -1, :] * theta).unsqueeze(-1),
    )
