"""The memory rule: the four choices bound to the tensors that they need, and what follows from them.

Legend: B batch, H heads, G = B·H rows, n tokens, in/out widths of one map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.miras import MirasConfig
from titans.miras.networks import Apply
from titans.ops.memory.decay import ChunkEnd
from titans.ops.memory.maps import map_kind, retain, wide

NORM_EPS = 1e-6
Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """What a layer's memory computes, with its slow parameters.

    Attributes:
        miras: the four choices.
        initial: learned initial weights A_0, one per map, [H, out, in] (vector: [H, D]).
        chunk_size: C ≥ 1.
        norm: gain and bias of the LN wrapper, each [H, D]; None: 1 and 0.
        steps: for algorithms that write per chunk, per map [H] > 0; None: `default_steps`.

    Raises:
        ValueError: a shape that does not fit, named.
    """

    miras: MirasConfig
    initial: Maps
    chunk_size: int
    norm: tuple[Tensor, Tensor] | None = None
    steps: Maps | None = None

    @property
    def heads(self) -> int:
        return self.initial[0].shape[0]

    @property
    def width(self) -> int:
        """D, the width of a head."""
        return self.initial[-1].shape[1]

    def check(self, heads: int, width: int) -> None:
        """Raise a ValueError unless the tensors fit queries of this many heads and this width."""
        wanted = [[heads, *shape] for shape in self.miras.architecture.shapes(width)]
        if (found := [list(w.shape) for w in self.initial]) != wanted:
            raise ValueError(f"weights must have shapes {wanted} for {self.miras.architecture!r}, got {found}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        for name, x in zip(("gain", "bias"), self.norm or (), strict=False):
            if list(x.shape) != [heads, width]:
                raise ValueError(f"norm's {name} must be [H, D] = {[heads, width]}, got {list(x.shape)}")
        if self.steps is None:
            return
        if not self.miras.algorithm.per_chunk:
            raise ValueError(
                f"steps must be None with algorithm {self.miras.algorithm.name!r}: they belong to algorithms that "
                "write once per chunk"
            )
        if not isinstance(self.steps, tuple):
            raise ValueError(f"steps must be a tuple of tensors, got {type(self.steps).__name__}")
        if (found := [list(s.shape) for s in self.steps]) != [[heads]] * len(wanted):
            raise ValueError(f"steps must be one [H] = [{heads}] for each of {len(wanted)} maps, got {found}")

    def expand(self, batch: int, dtype: torch.dtype) -> RowRule:
        """The rule for every row of a batch."""
        initial = tuple(w.to(dtype) for w in self.initial)
        anchors = steps = None
        if not self.miras.retention.identity:
            anchors = self._anchors(initial, batch)
        if self.miras.algorithm.per_chunk:
            # The engines sum θ over a chunk; the mean is that over C.
            learned = self.steps or default_steps(self.initial)
            steps = tuple(_expand(s.to(dtype) / self.chunk_size, batch).unsqueeze(-1) for s in learned)
        return RowRule(
            self.miras, tuple(_expand(w, batch) for w in initial), anchors, *self._norm_rows(batch, dtype), steps
        )

    def reading(self, batch: int, dtype: torch.dtype) -> RowRule:
        """Of `expand` what a read inside a chunk needs: no A_0, and anchors only where they scale the read."""
        scaled = self.miras.retention.inside == "scaled"
        anchors = self._anchors(tuple(w.to(dtype) for w in self.initial), batch) if scaled else None
        return RowRule(self.miras, (), anchors, *self._norm_rows(batch, dtype))

    def _anchors(self, initial: Maps, batch: int) -> Maps:
        return tuple(_expand(self.miras.retention.anchor(w), batch) for w in initial)

    def _norm_rows(self, batch: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        if not self.miras.architecture.residual_norm:
            return None, None
        plain = self.initial[0].new_ones(self.heads, self.width), self.initial[0].new_zeros(self.heads, self.width)
        gain, bias = (_expand(x.to(dtype), batch).unsqueeze(1) for x in self.norm or plain)
        return gain, bias


def default_steps(weights: Maps) -> Maps:
    """Starting steps of muon per map and head: a tenth of ‖A_0‖_F / √min(out, in), [H] each."""
    norms = (torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights)
    return tuple(0.1 * n / min(w.shape[1:]) ** 0.5 for n, w in zip(norms, weights, strict=True))


def _expand(x: Tensor, batch: int) -> Tensor:
    """[H, ...] -> [B·H, ...]."""
    return x.expand(batch, *x.shape).flatten(0, 1)


@dataclass(frozen=True)
class View:
    """What a read inside a chunk sees of one map, beside φ(A_c), the weights at the chunk's start.

    Attributes:
        fades: the chunk's forgetting acts on φ(A_c).
        writes: the chunk's own writes, and its momentum, are added.
        scale: times this, [G, 1, ...]; None: 1.
    """

    fades: bool
    writes: bool
    scale: Tensor | None = None

    def shown(self, x: Tensor) -> Tensor:
        """Momentum or errors on the scale on which a read sees them; x [G, ..., ...]."""
        return x if self.scale is None else x * self.scale.view((-1,) + (1,) * (x.dim() - 1))


@dataclass(frozen=True)
class RowRule:
    """A `Rule` in the engines' layout: one entry per map, one row per sample and head.

    Attributes:
        miras: the four choices.
        initial: A_0, [G, out, in] (vector: [G, D]).
        anchors: what the retention gate keeps of A_0; None where it needs nothing.
        gain, bias: of the LN wrapper, [G, 1, D]; None without the wrapper.
        steps: for algorithms that write per chunk, s = steps · Σθ of the chunk; [G, 1].
    """

    miras: MirasConfig
    initial: Maps
    anchors: Maps | None
    gain: Tensor | None
    bias: Tensor | None
    steps: Maps | None = None

    def view(self, index: int, accumulated: Maps) -> View:
        """What a read strictly inside a chunk sees of map ``index``; ``accumulated`` is A at the chunk's start."""
        retention = self.miras.retention
        if retention.inside == "hidden":
            return View(fades=False, writes=False)
        scale = None
        if retention.inside == "scaled" and self.anchors is not None:
            scale = retention.factor(accumulated[index], self.anchors[index])
        return View(fades=not retention.decays_to_initial, writes=not self.miras.algorithm.per_chunk, scale=scale)

    @property
    def expansion_is_exact(self) -> bool:
        """Do a chunk's last read and the next chunk's start come out of the dual form itself?"""
        return self.miras.retention.identity and not self.miras.algorithm.per_chunk

    def use(self, accumulated: Maps) -> Maps:
        """W at a chunk's start, from the state's A: φ(A), unless A was replaced by it when the last chunk closed."""
        return accumulated if self.miras.retention.replaces else self.project(accumulated)

    def project(self, accumulated: Maps) -> Maps:
        """W = φ(A)."""
        if self.anchors is None:
            return accumulated
        retention = self.miras.retention
        return tuple(retention.project(a, anchor) for a, anchor in zip(accumulated, self.anchors, strict=True))

    def close(self, accumulated: Maps) -> tuple[Maps, Maps]:
        """(A, W) at a chunk's end, from the accumulated weights."""
        used = self.project(accumulated)
        return (used if self.miras.retention.replaces else accumulated), used

    def retain(self, index: int, ending: ChunkEnd, weight: Tensor) -> Tensor:
        """What a chunk's forgetting leaves of map ``index``'s A: P_C A, or P_C A + (1 - P_C) A_0 if it pulls there."""
        if self.anchors is None or ending.retained is None or not self.miras.retention.decays_to_initial:
            return retain(ending.retained, weight)
        return torch.lerp(self.anchors[index], weight, wide(ending.retained, weight))

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

    def gradient_factors(self, weights: Maps, k: Tensor, v: Tensor, delta: Tensor | None) -> tuple[Maps, Maps, Tensor]:
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

    def applied(self, weights: Maps) -> Callable[[int, Tensor], Tensor]:
        """``apply`` at fixed weights."""
        return lambda i, x: map_kind(weights[i]).apply(weights[i], x)
