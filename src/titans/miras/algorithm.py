"""Memory algorithms: how the gradients of the inner objective become writes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from titans.miras.choice import Choice


class Algorithm(Choice):
    """Axis 4, the inner optimiser.

    Attributes:
        momentum: past surprise S is carried along.
        per_chunk: the chunk's momentum S_C is written at once when the chunk closes, as A_C = P_C A_c + s·U(S_C) with
            U = ``update`` and s the chunk's mean of θ times a learned step per map and head. Needs ``momentum``.
            Otherwise every token writes its own S_t.
    """

    axis: ClassVar[str] = "algorithm"
    momentum: ClassVar[bool] = False
    per_chunk: ClassVar[bool] = False

    def update(self, momentum: Tensor) -> Tensor:
        """For ``per_chunk``: U(S_C) for one map, [rows, out, in] (rows are samples and heads)."""
        raise NotImplementedError(f"algorithm {self.name!r} says per_chunk but defines no update")


class GradientDescent(Algorithm):
    """S_t = -θ_t g_t: the MIRAS variants' own choice."""

    name: ClassVar[str] = "gradient_descent"


class Momentum(Algorithm):
    """S_t = η_t S_{t-1} - θ_t g_t: past and momentary surprise (Titans Eqs. 9-10)."""

    name: ClassVar[str] = "momentum"
    momentum: ClassVar[bool] = True


class Muon(Algorithm):
    """The chunk's momentum, orthogonalised by five Newton-Schulz steps, is written when the chunk closes.

    Source: Muon (Jordan et al. 2024) as an inner optimiser, after LaCT (2505.23884) and Atlas (2505.23735).
    """

    name: ClassVar[str] = "muon"
    momentum: ClassVar[bool] = True
    per_chunk: ClassVar[bool] = True

    def update(self, momentum: Tensor) -> Tensor:
        return newton_schulz(momentum)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of x [rows, out, in] towards 1 (between 0.7 and 1.2), keeping the singular vectors.

    A matrix of zeros stays one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = a * x + torch.bmm(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x)
    return x.mT if tall else x
