"""One memory rule bound to its slow parameters: what both engines need to know, and the maps' arithmetic.

Legend: G batch times heads, n tokens, in/out widths of one map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.miras import MirasConfig
from titans.miras.networks import Apply
from titans.ops.memory.decay import Decay, Ending

NORM_EPS = 1e-6


class Dense:
    """A matrix map W [G, out, in]; the gradient of one token is the rank-one δ aᵀ."""

    @staticmethod
    def apply(weight: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(x, weight.mT)

    @staticmethod
    def transpose(weight: Tensor, error: Tensor) -> Tensor:
        return torch.bmm(error, weight)

    @staticmethod
    def read(x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, decay: Decay) -> Tensor:
        """W_t x_t for every query t of the chunk, without ever forming W_t."""
        out = torch.bmm(x if decay.retained is None else decay.retained * x, weight.mT)
        if momentum is not None and decay.pushed is not None:
            out = torch.baddbmm(out, decay.pushed * x, momentum.mT)
        return torch.baddbmm(out, torch.bmm(x, a.mT) * decay.kernel, error, alpha=-1)

    @staticmethod
    def write(base: Tensor, a: Tensor, error: Tensor, share: Tensor) -> Tensor:
        """base - Σ_i share_i δ_i a_iᵀ, share [G, n, 1]."""
        return torch.baddbmm(base, (share * error).mT, a, alpha=-1)

    @staticmethod
    def surprise(a: Tensor, error: Tensor) -> Tensor:
        """‖g_i‖² per token, [G, n]."""
        return a.square().sum(-1) * error.square().sum(-1)


class Diagonal:
    """An elementwise map w [G, width]; the gradient of one token is δ ⊙ a."""

    @staticmethod
    def apply(weight: Tensor, x: Tensor) -> Tensor:
        return weight.unsqueeze(-2) * x

    transpose = apply

    @staticmethod
    def read(x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, decay: Decay) -> Tensor:
        now = weight.unsqueeze(-2) if decay.retained is None else decay.retained * weight.unsqueeze(-2)
        if momentum is not None and decay.pushed is not None:
            now = now + decay.pushed * momentum.unsqueeze(-2)
        return (now - torch.bmm(decay.kernel, error * a)) * x

    @staticmethod
    def write(base: Tensor, a: Tensor, error: Tensor, share: Tensor) -> Tensor:
        return base - (share * error * a).sum(-2)

    @staticmethod
    def surprise(a: Tensor, error: Tensor) -> Tensor:
        return (a * error).square().sum(-1)


def map_kind(weight: Tensor) -> type[Dense] | type[Diagonal]:
    """The arithmetic of a map, told by its rank ([G, out, in] or [G, width])."""
    return Dense if weight.dim() == 3 else Diagonal


def advance_momentum(ending: Ending, momentum: Tensor, a: Tensor, error: Tensor) -> Tensor:
    """S at the chunk's end."""
    assert ending.carried is not None and ending.momentum_share is not None
    return map_kind(momentum).write(wide(ending.carried, momentum) * momentum, a, error, ending.momentum_share)


def advance_weight(ending: Ending, base: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor) -> Tensor:
    """A at the chunk's end: ``base``, what is left of A, and the writes; ``momentum`` is S at its start."""
    if momentum is not None and ending.pushed is not None:
        base = torch.addcmul(base, wide(ending.pushed, momentum), momentum)
    return map_kind(base).write(base, a, error, ending.share)


def retain(retained: Tensor | None, weight: Tensor) -> Tensor:
    """P A."""
    return weight if retained is None else wide(retained, weight) * weight


def wide(gate: Tensor, weight: Tensor) -> Tensor:
    """A number per row or output channel, [G, 1 or out], in a shape that multiplies a map's weights."""
    return gate.unsqueeze(-1) if weight.dim() == 3 else gate


def where_rows(rows: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Per map, ``new`` for the rows [G] that are True and ``old`` for the others."""
    return tuple(torch.where(rows.view((-1,) + (1,) * (n.dim() - 1)), n, o) for n, o in zip(new, old, strict=True))


@dataclass(frozen=True)
class Rule:
    """A MirasConfig with the tensors that it needs, one entry per map.

    Attributes:
        miras: the four choices.
        anchors: what the retention gate keeps of A_0, per map; None where it needs nothing.
        gain, bias: of the LN wrapper, [G, 1, D]; None without the wrapper.
        steps: for algorithms that write per chunk, s = steps · Σθ of the chunk; [G, 1] per map.
    """

    miras: MirasConfig
    anchors: tuple[Tensor, ...] | None
    gain: Tensor | None
    bias: Tensor | None
    steps: tuple[Tensor, ...] | None = None

    @property
    def expansion_is_exact(self) -> bool:
        """Do a chunk's last read and the next chunk's start come out of the dual form itself?"""
        return self.miras.retention.identity and not self.miras.algorithm.per_chunk

    def use(self, accumulated: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """W at a chunk's start, from the state's A: φ(A), unless A was replaced by it when the last chunk closed."""
        return accumulated if self.miras.retention.replaces else self.project(accumulated)

    def project(self, accumulated: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """W = φ(A)."""
        retention = self.miras.retention
        if self.anchors is None:
            return accumulated
        return tuple(retention.project(a, anchor) for a, anchor in zip(accumulated, self.anchors, strict=True))

    def close(self, accumulated: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(A, W) at a chunk's end, from the accumulated weights."""
        used = self.project(accumulated)
        return (used if self.miras.retention.replaces else accumulated), used

    def retain(self, index: int, ending: Ending, weight: Tensor) -> Tensor:
        """What a chunk's forgetting leaves of map ``index``'s A: P_C A, or P_C A + (1 - P_C) A_0 if it pulls there."""
        if self.anchors is None or ending.retained is None or not self.miras.retention.pulls:
            return retain(ending.retained, weight)
        return torch.lerp(self.anchors[index], weight, wide(ending.retained, weight))

    def retain_inside(self, ending: Ending, weight: Tensor) -> Tensor:
        """What a read inside the chunk sees of φ(A_c): P_t φ(A_c), but nothing of a pull."""
        return weight if self.miras.retention.pulls else retain(ending.retained, weight)

    def write_at_once(self, kept: Tensor, momentum: Tensor, total: Tensor, index: int) -> Tensor:
        """A_C = P_C A_c + s·U(S_C) for one map, from its first term, S_C and the chunk's Σθ [G, 1 or out]."""
        assert self.steps is not None
        return kept + wide(self.steps[index] * total, kept) * self.update(momentum, total)

    def update(self, momentum: Tensor, total: Tensor) -> Tensor:
        """U(S_C) of one map; nothing where S_C is but rounding errors, which U would blow up to full size."""
        size = torch.linalg.vector_norm(momentum.flatten(1), dim=1)
        noise = 100 * torch.finfo(size.dtype).eps * total.amax(1)
        return self.miras.algorithm.update(momentum) * (size > noise).view(-1, 1, 1)

    def value(self, x: Tensor, apply: Apply) -> Tensor:
        """M(x) = f(x), or x + LN(f(x)) with the wrapper; x [G, n, D]."""
        out = self.miras.architecture.forward(x, apply)
        if self.gain is None or self.bias is None:
            return out
        return x + torch.nn.functional.layer_norm(out, out.shape[-1:], eps=NORM_EPS) * self.gain + self.bias

    def gradient_factors(
        self, weights: tuple[Tensor, ...], k: Tensor, v: Tensor, delta: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Inputs a_i and errors δ_i of every map at the given weights, in closed form, and the residual M(k) - v."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def apply(i: int, x: Tensor) -> Tensor:
            inputs.append(x)
            outputs.append(map_kind(weights[i]).apply(weights[i], x))
            return outputs[-1]

        def transpose(i: int, error: Tensor) -> Tensor:
            return map_kind(weights[i]).transpose(weights[i], error)

        out = self.miras.architecture.forward(k, apply)
        if self.gain is None or self.bias is None:
            residual = out - v
            error = self.miras.bias.error(residual, delta)
        else:
            centred = out - out.mean(-1, keepdim=True)
            scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
            normed = centred * scale
            residual = k + normed * self.gain + self.bias - v
            g = self.miras.bias.error(residual, delta) * self.gain
            error = scale * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
        return tuple(inputs), self.miras.architecture.errors(error, outputs, transpose), residual

    def applied(self, weights: tuple[Tensor, ...]) -> Callable[[int, Tensor], Tensor]:
        """``apply`` at fixed weights."""
        return lambda i, x: map_kind(weights[i]).apply(weights[i], x)
