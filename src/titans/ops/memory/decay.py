"""K, P and m of the dual form: what the gates alone contribute to a chunk (math.md §3).

Legend: G batch times heads, t and i token positions inside a chunk of C tokens, t the later one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Ending:
    """How a chunk's end depends on its start and on its writes.

    A_C = retained A_0 + pushed S_0 - Σ_i share_i δ_i a_iᵀ        S_C = carried S_0 - Σ_i momentum_share_i δ_i a_iᵀ

    Numbers per row ("out" = 1) or per output channel of one map; the momentum's three are None without momentum.

    Attributes:
        share: K[C, i] θ_i, [G, n, out].
        retained: P_C, [G, out]; None without forgetting.
        pushed: m_C, [G, out].
        carried: h_C, [G, 1].
        momentum_share: Lη[C, i] θ_i, [G, n, out].
        steps: Σ_i θ_i, [G, out].
    """

    share: Tensor
    retained: Tensor | None
    pushed: Tensor | None
    carried: Tensor | None
    momentum_share: Tensor | None
    steps: Tensor


@dataclass(frozen=True)
class Decay:
    """How the weights right after token t depend on the chunk's start and on the write of token i, for every map.

    W_t = retained_t W_0 + pushed_t S_0 - Σ_i kernel[t, i] δ_i a_iᵀ
    S_C = carried S_0 - Σ_i momentum_kernel[i] δ_i a_iᵀ

    Attributes:
        kernel: K[t, i] θ_i, [..., C, C].
        retained: P_t, [..., C, 1]; None without forgetting (P = 1).
        pushed: m_t, [..., C, 1]; None without momentum.
        carried: h_C, [..., 1, 1]; None without momentum.
        momentum_kernel: Lη[C, i] θ_i, [..., C, 1]; None without momentum.
        steps: Σ_i θ_i, [..., 1].
    """

    kernel: Tensor
    retained: Tensor | None
    pushed: Tensor | None
    carried: Tensor | None
    momentum_kernel: Tensor | None
    steps: Tensor

    def of_map(self, index: int) -> Decay:
        """The decay of one map: the same for all."""
        return self

    def last(self, queries: int) -> Decay:
        """For the last ``queries`` tokens as readers; all tokens stay writers."""
        if self.kernel.shape[-2] == queries:
            return self
        kernel, retained, pushed = (
            None if r is None else r[:, -queries:] for r in (self.kernel, self.retained, self.pushed)
        )
        assert kernel is not None
        return replace(self, kernel=kernel, retained=retained, pushed=pushed)

    def ending(self) -> Ending:
        """What remains when the chunk closes."""
        retained, pushed = (None if r is None else r[:, -1] for r in (self.retained, self.pushed))
        carried = None if self.carried is None else self.carried[:, 0]
        return Ending(self.kernel[:, -1].unsqueeze(-1), retained, pushed, carried, self.momentum_kernel, self.steps)


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
        return Decay(forget * theta.unsqueeze(-2), retained, None, None, None, theta.sum(-1, keepdim=True))
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
        steps=theta.sum(-1, keepdim=True),
    )
