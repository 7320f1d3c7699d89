"""Retention gates: how the accumulated weights A become the weights W = φ(A) that are used."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from titans.miras.choice import Choice


class Retention(Choice):
    """Axis 3, a mirror map φ beside the decay α_t.

    ``replaces`` says that A itself becomes φ(A) when a chunk closes; ``identity`` that φ(A) = A, so that an engine
    need not call it.
    """

    axis: ClassVar[str] = "retention"
    replaces: ClassVar[bool] = False
    identity: ClassVar[bool] = False

    @abstractmethod
    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        """φ(A), same shape as A = ``accumulated`` [..., out, in] (or [..., width])."""

    def anchor(self, initial: Tensor) -> Tensor:
        """What ``project`` needs of the learned initial weights A_0, computed once per call."""
        return initial


class WeightDecay(Retention):
    """φ(A) = A: nothing but the forgetting gate (Titans Eq. 13)."""

    name: ClassVar[str] = "weight_decay"
    identity: ClassVar[bool] = True

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return accumulated


class SphereRetention(Retention):
    """Every row of A is scaled back to that row's norm in the learned initial weights (after LaCT, 2505.23884).

    The weights can then neither blow up nor wither, however long the stream. A row that was forgotten down to rounding
    errors has no direction left to keep: it stays as it is until something is written into it.
    """

    name: ClassVar[str] = "sphere"
    replaces: ClassVar[bool] = True

    def anchor(self, initial: Tensor) -> Tensor:
        return torch.linalg.vector_norm(initial, dim=-1, keepdim=True)

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        found = torch.linalg.vector_norm(accumulated, dim=-1, keepdim=True)
        alive = found > anchor * torch.finfo(found.dtype).eps
        return accumulated * torch.where(alive, anchor / torch.where(alive, found, 1), 1)
