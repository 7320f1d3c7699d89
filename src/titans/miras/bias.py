"""Attentional biases: what the memory is asked to get right, given as a loss and its error signal."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from titans.miras.choice import Choice


class Bias(Choice):
    """Axis 2, the inner objective ℓ as a function of the residual r = M(k) - v, shape [..., D]."""

    axis: ClassVar[str] = "bias"

    @abstractmethod
    def loss(self, residual: Tensor) -> Tensor:
        """ℓ per token, shape [...]."""

    @abstractmethod
    def error(self, residual: Tensor) -> Tensor:
        """e = ∂ℓ/∂M(k), shape [..., D]; the engines back-propagate it as the cotangent of M(k)."""


class L2(Bias):
    """ℓ = ‖r‖², e = 2r (Titans Eq. 12)."""

    name: ClassVar[str] = "l2"

    def loss(self, residual: Tensor) -> Tensor:
        return residual.square().sum(-1)

    def error(self, residual: Tensor) -> Tensor:
        return 2 * residual
