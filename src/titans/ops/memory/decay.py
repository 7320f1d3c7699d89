"""K, P and m of the dual form: what the gates alone contribute to a chunk (math.md §3), one number per head.

Legend: G batch times heads, t and i token positions inside a chunk of C tokens, t the later one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.autograd import hand_written
from titans.ops.memory.maps import Dense, map_kind, wide
from titans.ops.memory.tokens import Gates


@dataclass(frozen=True)
class ChunkEnd:
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

    def momentum(self, momentum: Tensor, a: Tensor, error: Tensor) -> Tensor:
        """S_C of one map."""
        assert self.carried is not None and self.momentum_share is not None
        return map_kind(momentum).write(wide(self.carried, momentum) * momentum, a, error, self.momentum_share)

    def weight(self, base: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor) -> Tensor:
        """A_C of one map: ``base``, what is left of A, and the writes; ``momentum`` is S at the chunk's start."""
        if momentum is not None and self.pushed is not None:
            base = torch.addcmul(base, wide(self.pushed, momentum), momentum)
        return map_kind(base).write(base, a, error, self.share)


class MapDecay(Protocol):
    """The gates' part in one map of a chunk, whichever kind of gates there are."""

    @property
    def retained(self) -> Tensor | None:
        """P_t of the queries, in a shape that multiplies [G, m, out]; None without forgetting."""
        ...

    def read(self, x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, fades: bool) -> Tensor:
        """W_t x_t for the queries x [G, m, in], without ever forming W_t.

        Args:
            x: of the chunk's last m tokens.
            weight, momentum: W and S at the chunk's start.
            a, error: of all the chunk's tokens so far.
            fades: does forgetting act on ``weight``? On writes it always does.
        """
        ...

    def ending(self) -> ChunkEnd:
        """What remains of the start and of every write when the tokens so far end."""
        ...


class Decays(Protocol):
    """The gates of a chunk's tokens so far, for all maps; the last ones are queries, all are writers."""

    def of_map(self, index: int) -> MapDecay: ...

    def last(self, queries: int) -> Decays:
        """For the last ``queries`` tokens as readers."""
        ...


@dataclass(frozen=True)
class Decay:
    """Gates that are numbers of a head: one decay serves every map.

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

    @classmethod
    def of(cls, gates: Gates) -> Decay:
        """From gates [..., C] of one or many chunks."""
        theta, eta, alpha, write = gates.theta, gates.eta, gates.alpha, gates.write
        assert isinstance(theta, Tensor) and not isinstance(alpha, tuple)
        size = theta.shape[-1]
        if alpha is None:
            forget = torch.ones(size, size, dtype=theta.dtype, device=theta.device).tril()
            retained = None
        else:
            forget = cumulative_products(1 - alpha)
            retained = forget[..., :1] * (1 - alpha[..., :1]).unsqueeze(-1)
        steps = theta.sum(-1, keepdim=True)
        if eta is None:
            return cls(forget * theta.unsqueeze(-2), retained, None, None, None, steps)
        if write is not None:
            forget = forget * write.unsqueeze(-2)
        momentum = cumulative_products(eta)
        decayed = momentum[..., :1] * eta[..., :1].unsqueeze(-1)
        return cls(
            kernel=(forget @ momentum) * theta.unsqueeze(-2),
            retained=retained,
            pushed=forget @ decayed,
            carried=decayed[..., -1:, :],
            momentum_kernel=(momentum[..., -1, :] * theta).unsqueeze(-1),
            steps=steps,
        )

    def unbind(self) -> Sequence[Decay]:
        """Of many chunks [G, n, ...] the decay of each."""
        fields = [getattr(self, f.name) for f in dataclasses.fields(self)]
        parts = [(None,) * self.kernel.shape[1] if f is None else f.unbind(1) for f in fields]
        return [Decay(*part) for part in zip(*parts, strict=True)]

    def of_map(self, index: int) -> Decay:
        return self

    def last(self, queries: int) -> Decay:
        if self.kernel.shape[-2] == queries:
            return self
        retained, pushed = (None if r is None else r[:, -queries:] for r in (self.retained, self.pushed))
        return replace(self, kernel=self.kernel[:, -queries:], retained=retained, pushed=pushed)

    def read(self, x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, fades: bool) -> Tensor:
        retained = self.retained if fades else None
        if map_kind(weight) is Dense:
            out = torch.bmm(x if retained is None else retained * x, weight.mT)
            if momentum is not None and self.pushed is not None:
                out = torch.baddbmm(out, self.pushed * x, momentum.mT)
            return torch.baddbmm(out, torch.bmm(x, a.mT) * self.kernel, error, alpha=-1)
        now = weight.unsqueeze(-2) if retained is None else retained * weight.unsqueeze(-2)
        if momentum is not None and self.pushed is not None:
            now = now + self.pushed * momentum.unsqueeze(-2)
        return (now - torch.bmm(self.kernel, error * a)) * x

    def ending(self) -> ChunkEnd:
        retained, pushed = (None if r is None else r[:, -1] for r in (self.retained, self.pushed))
        carried = None if self.carried is None else self.carried[:, 0]
        return ChunkEnd(self.kernel[:, -1].unsqueeze(-1), retained, pushed, carried, self.momentum_kernel, self.steps)


class _CumulativeProducts(torch.autograd.Function):
    """L[t, i] = Π_{j=i+1..t} g_j with a backward that is one small matrix product.

    ∂L[t, i]/∂g_j = L[t, j] L[j-1, i], so the gradient of g_j is Σ_i (Lᵀ G)[j, i] L[j-1, i]: no division, hence exact at
    gates of 0, where autograd's rule for a cumulative product has to take a slow path.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor) -> Tensor:  # type: ignore[override]
        size = gates.shape[-1]
        below = torch.ones(size, size, dtype=torch.bool, device=gates.device).tril(-1)
        products = torch.where(below, gates.unsqueeze(-1), 1).cumprod(-2).tril()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    @hand_written
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
