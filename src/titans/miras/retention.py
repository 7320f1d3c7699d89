"""Retention gates: how the accumulated weights A become the weights W = φ(A) that are used.

Shapes: A and W are [rows, out, in] for a matrix map, [rows, width] for a diagonal one; rows are samples and heads.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from titans.miras.choice import Choice

Inside = Literal["shown", "scaled", "hidden"]
FLOOR = 0.01


class Retention(Choice):
    """Axis 3, a mirror map φ beside the decay α_t.

    Attributes:
        replaces: A itself becomes φ(A) when a chunk closes.
        identity: φ(A) = A, so that an engine need not call it.
        decays_to_initial: forgetting is a pull towards A_0, not towards 0; ``anchor`` must then give A_0 itself. A read
            inside a chunk sees the chunk's writes but not its pull.
        inside: what a read strictly inside a chunk sees of the chunk's decay and writes. "shown": all, added to φ(A_c);
            "scaled": all, times ``factor`` of the chunk's start; "hidden": nothing before the next chunk.
        initial_forgetting: where a layer's α starts. Forgetting that nothing makes up for would empty an untrained
            memory, and a layer norm of almost nothing has almost infinite gradients (docs/miras.md).
        step_scale: a layer's default cap of θ, relative to weight decay's.
    """

    axis: ClassVar[str] = "retention"
    replaces: ClassVar[bool] = False
    identity: ClassVar[bool] = False
    decays_to_initial: ClassVar[bool] = False
    inside: ClassVar[Inside] = "shown"
    initial_forgetting: ClassVar[float] = 0.001
    step_scale: ClassVar[float] = 1.0

    @abstractmethod
    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        """φ(A), same shape as A = ``accumulated``."""

    def initial(self, weights: Tensor) -> Tensor:
        """Where the learned A_0 of a layer starts, from weights [H, …] that would suit a plain network."""
        return weights

    def anchor(self, initial: Tensor) -> Tensor:
        """What ``project`` needs of the learned initial weights A_0, computed once per call."""
        return initial

    def factor(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        """For ``inside = "scaled"``: s with φ(A) = s A, one number per row of the batch, [rows, 1, …]."""
        raise NotImplementedError(f"retention {self.name!r} says inside = 'scaled' but defines no factor")


class WeightDecay(Retention):
    """φ(A) = A: nothing but the forgetting gate (Titans Eq. 13)."""

    name: ClassVar[str] = "weight_decay"
    identity: ClassVar[bool] = True

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return accumulated


class LqRetention(Retention):
    """φ(A) = A / ‖A‖_q^{q-2}, the norm taken over the entries of each weight matrix (Moneta, MIRAS Eq. 24).

    To the letter, W grows without bound while A is forgotten (q > 3). So the norm in the formula never counts as less
    than a hundredth of A_0's.
    """

    name: ClassVar[str] = "lq"
    inside: ClassVar[Inside] = "scaled"
    step_scale: ClassVar[float] = 1 / 4  # W moves about that much faster than A where ``initial`` starts
    q: float = Field(default=4.0, ge=1, le=8)

    def initial(self, weights: Tensor) -> Tensor:
        """A_0 with φ(A_0) = ``weights``; φ(c A) = c^{3-q} φ(A), so around q = 3 there is none of a sane size."""
        return weights if abs(self.q - 3) < 0.5 else weights * self._norm(weights).pow((self.q - 2) / (3 - self.q))

    def anchor(self, initial: Tensor) -> Tensor:
        return FLOOR * self._norm(initial)

    def factor(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return torch.maximum(self._norm(accumulated), anchor).pow(2 - self.q)

    def _norm(self, weights: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weights, self.q, tuple(range(1, weights.dim())), keepdim=True)

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return accumulated * self.factor(accumulated, anchor)


class KLRetention(Retention):
    """φ(A) = scale · softmax(A) over the input axis; A plays log W (Memora, MIRAS Eq. 27)."""

    name: ClassVar[str] = "kl"
    inside: ClassVar[Inside] = "hidden"
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def initial(self, weights: Tensor) -> Tensor:
        """Logarithms that differ by about 2 along the input axis: rows that differ enough to tell inputs apart."""
        return _spread(weights)

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return self.scale * accumulated.softmax(-1)


class ElasticNet(Retention):
    """φ(A) = sign(A)·max(|A| - l1, 0): small weights are exactly zero (MIRAS Eqs. 22-23)."""

    name: ClassVar[str] = "elastic_net"
    l1: float = Field(default=1e-3, ge=0, allow_inf_nan=False)

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return torch.nn.functional.softshrink(accumulated, self.l1)


class SigmoidRetention(Retention):
    """φ(A) = σ(A): weights between 0 and 1, the Bregman case of an entropy per entry (MIRAS §4.3)."""

    name: ClassVar[str] = "sigmoid"
    inside: ClassVar[Inside] = "hidden"

    def initial(self, weights: Tensor) -> Tensor:
        """Logits that differ by about 2 along the input axis."""
        return _spread(weights)

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return accumulated.sigmoid()


class SphereRetention(Retention):
    """Every row of A is scaled back to that row's norm in the learned initial weights (after LaCT, 2505.23884).

    The weights can then neither blow up nor wither, however long the stream. A row that was forgotten down to rounding
    errors has no direction left to keep: it stays as it is until something is written into it.
    """

    name: ClassVar[str] = "sphere"
    replaces: ClassVar[bool] = True
    initial_forgetting: ClassVar[float] = 0.02

    def anchor(self, initial: Tensor) -> Tensor:
        return torch.linalg.vector_norm(initial, dim=-1, keepdim=True)

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        found = torch.linalg.vector_norm(accumulated, dim=-1, keepdim=True)
        alive = found > anchor * torch.finfo(found.dtype).eps
        return accumulated * torch.where(alive, anchor / torch.where(alive, found, 1), 1)


class AnchoredRetention(SphereRetention):
    """As ``sphere``, but what is forgotten gives way to the learned initial weights instead of to nothing.

    A_t = (1 - α_t) A_{t-1} + α_t A_0 + S_t. Under ``sphere`` every write is at the expense of A_0, and a memory that
    has read much differs from any that it was trained with. Here writes fade at the rate α and A_0 comes back: the
    state after a million tokens is of the same kind as after a few half-lives (docs/results/lasting.md).
    """

    name: ClassVar[str] = "anchored"
    decays_to_initial: ClassVar[bool] = True
    initial_forgetting: ClassVar[float] = 0.0014  # a half-life of 500 tokens: training shortens it more easily than not

    def anchor(self, initial: Tensor) -> Tensor:
        return initial

    def project(self, accumulated: Tensor, anchor: Tensor) -> Tensor:
        return super().project(accumulated, super().anchor(anchor))


def _spread(weights: Tensor) -> Tensor:
    """Weights of a plain network, of standard deviation 1/√in (a diagonal's: 1), at a standard deviation of 2."""
    return 2 * weights * (weights.shape[-1] ** 0.5 if weights.dim() == 3 else 1)
