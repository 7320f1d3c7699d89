"""What the gates alone contribute to whole chunks, and its gradient by hand (math.md §3).

Legend: [..., C] tokens of one chunk, t the later and i the earlier token. L[t, i] = Π_{j=i+1..t} g_j for i ≤ t, else 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class GateGradients:
    """Cotangents of the fields of ``GateKernels``; where a field is None, so is its cotangent."""

    kernel: Tensor
    retained: Tensor | None
    pushed: Tensor | None
    carried: Tensor | None
    momentum_share: Tensor | None


class GateKernels:
    """W_t = retained_t W_0 + pushed_t S_0 - Σ_i kernel[t, i] g_i and S_C = carried S_0 - Σ_i momentum_share_i g_i.

    Attributes:
        kernel: K[t, i] θ_i, [..., C, C].
        retained: P_t, [..., C]; None without forgetting.
        pushed: m_t, [..., C]; None without momentum.
        carried: h_C, [...]; None without momentum.
        momentum_share: Lη[C, i] θ_i, [..., C]; None without momentum.

    Args:
        theta, eta, alpha: gates [..., C]; eta or alpha None switches that term off.
        write: [..., C], 0 where the weights do not take the momentum up. None: 1 everywhere.
    """

    def __init__(self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, write: Tensor | None):
        self._theta, self._eta, self._alpha, self._write = theta, eta, alpha, write
        size = theta.shape[-1]
        if alpha is None:
            self._forget = torch.ones(size, size, dtype=theta.dtype, device=theta.device).tril()
            self.retained = None
        else:
            self._forget = _products(1 - alpha)
            self.retained = self._forget[..., 0] * (1 - alpha[..., :1])
        self.pushed = self.carried = self.momentum_share = None
        self._sums = self._forget
        if eta is not None:
            self._written = self._forget if write is None else self._forget * write.unsqueeze(-2)
            self._momentum = _products(eta)
            self._decayed = self._momentum[..., 0] * eta[..., :1]
            self._sums = self._written @ self._momentum
            self.pushed = (self._written @ self._decayed.unsqueeze(-1)).squeeze(-1)
            self.carried = self._decayed[..., -1]
            self.momentum_share = self._momentum[..., -1, :] * theta
        self.kernel = self._sums * theta.unsqueeze(-2)

    def backward(self, grad: GateGradients) -> Gradients:
        """Gradients of theta, eta and alpha."""
        theta = (grad.kernel * self._sums).sum(-2)
        sums = grad.kernel * self._theta.unsqueeze(-2)
        eta = None
        if self._eta is not None:
            assert grad.pushed is not None and grad.carried is not None and grad.momentum_share is not None
            pushed = grad.pushed.unsqueeze(-1)
            decayed = (self._written.mT @ pushed).squeeze(-1)
            decayed[..., -1] += grad.carried
            momentum = self._written.mT @ sums
            momentum[..., -1, :] += grad.momentum_share * self._theta
            momentum[..., 0] += decayed * self._eta[..., :1]
            theta += grad.momentum_share * self._momentum[..., -1, :]
            eta = _products_backward(self._momentum, momentum)
            eta[..., 0] += (decayed * self._momentum[..., 0]).sum(-1)
            sums = torch.addcmul(sums @ self._momentum.mT, pushed, self._decayed.unsqueeze(-2))
            sums = sums if self._write is None else sums * self._write.unsqueeze(-2)
        if self._alpha is None:
            return theta, eta, None
        assert grad.retained is not None
        sums[..., 0] += grad.retained * (1 - self._alpha[..., :1])
        keep = _products_backward(self._forget, sums)
        keep[..., 0] += (grad.retained * self._forget[..., 0]).sum(-1)
        return theta, eta, keep.neg_()


def _products(gates: Tensor) -> Tensor:
    """L of gates [..., C]: a masked cumulative product, exact at gates of 0 and 1."""
    size = gates.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=gates.device).tril(-1)
    return torch.where(below, gates.unsqueeze(-1), 1).cumprod(-2).tril()


def _products_backward(products: Tensor, grad: Tensor) -> Tensor:
    """∂L[t, i]/∂g_j = L[t, j] L[j-1, i], so the gradient of g_j is Σ_i (Lᵀ G)[j, i] L[j-1, i]."""
    reached = products.mT @ grad.tril()
    return F.pad((reached[..., 1:, :] * products[..., :-1, :]).sum(-1), (1, 0))
