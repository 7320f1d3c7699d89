"""A few whole chunks in torch operations, forward and backward by hand.

What depends on the carried weights stays in a loop over chunks; all else is done for the segment's chunks at once.

Reads are shifted by one token: query row j of chunk c is token cC + j - 1. So a chunk's last token is row 0 of the next
chunk, read at that chunk's start, with nothing written yet: for all three retentions this is the rule itself, and no
chunk needs a second read at its end. The very last token is left to the caller.

Legend: n chunks, G rows, C tokens, D width, H hidden; [n, G, C, ·] throughout. With two maps z = k W1ᵀ, a = σ(z),
o = a W2ᵀ, h and b = σ(h) the same for queries, e1 and e2 the errors at the maps' outputs. With one map a = k, b = q.
Cotangents begin with d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops.memory.chunk_rule import ChunkRule, Maps
from titans.ops.memory.fused_gates import GateKernels
from titans.ops.memory.workspace import Layout

aten = torch.ops.aten
NORM_EPS = 1e-6
PDF = 0.3989422804014327  # 1 / √(2π)


class Inputs(NamedTuple):
    """A segment's tokens, chunk-major: q (shifted), k, v [n, G, C, D], gates [n, G, C]."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None
    write: Tensor | None


@dataclass(frozen=True)
class Anchor:
    """A_0 of one map [G, out, in], its rows' norms and their inverses [G, out, 1], 0 for 0, and what flows back."""

    weight: Tensor
    norm: Tensor
    inverse: Tensor
    d_weight: Tensor
    d_norm: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Anchor:
        norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        inverse = torch.where(norm > 0, 1 / norm, 0)
        return cls(weight, norm, inverse, torch.zeros_like(weight), torch.zeros_like(norm))

    def gradient(self) -> Tensor:
        """Of A_0, through both."""
        return torch.addcmul(self.d_weight, self.weight, self.d_norm * self.inverse)


def activation(name: str, x: Tensor, out: Tensor) -> None:
    if name == "gelu":
        aten.gelu.out(x, out=out)
    else:
        aten.silu.out(x, out=out)


def slope(name: str, error: Tensor, x: Tensor, out: Tensor) -> None:
    """error · σ'(x)."""
    if name == "gelu":
        aten.gelu_backward.grad_input(error, x, grad_input=out)
    else:
        aten.silu_backward.grad_input(error, x, grad_input=out)


def curvature(name: str, x: Tensor, out: Tensor, scratch: Tensor) -> None:
    """σ''(x): of gelu φ(x) (2 - x²), of silu s (1 - s) (2 + x (1 - 2 s)) with s the logistic function."""
    if name == "gelu":
        torch.mul(x, x, out=scratch)
        torch.sub(2, scratch, out=out)
        out.mul_(scratch.mul_(-0.5).exp_()).mul_(PDF)
    else:
        torch.sigmoid(x, out=scratch)
        torch.sub(1, scratch, alpha=2, out=out)
        out.mul_(x).add_(2).mul_(scratch)
        out.mul_(scratch.neg_().add_(1))


def norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """J g = rstd (g - mean g - n mean(g n)), the layer norm's symmetric Jacobian applied to ``grad``."""
    return aten.native_layer_norm_backward(grad, x, [x.shape[-1]], mean, rstd, None, None, [True, False, False])[0]


def normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x, mean and 1/√(variance)."""
    return torch.native_layer_norm(x, [x.shape[-1]], None, None, NORM_EPS)


class Segment:
    """What a segment's chunks share, and the loop over them.

    Args:
        rule, inputs: see there.
        anchors: per map; None with weight_decay.
        kept: the layout of ``kept_layout`` with room for all chunks, or for one where no backward will follow.
    """

    def __init__(self, rule: ChunkRule, inputs: Inputs, anchors: list[Anchor] | None, kept: dict[str, Tensor]):
        self.rule, self.x, self.anchors, self.kept = rule, inputs, anchors, kept
        self.gates = gates = GateKernels(*inputs[3:])
        self.steps = inputs.q.shape[0]
        self.kernel = F.pad(gates.kernel[:, :, :-1], (0, 0, 1, 0))
        self.share = gates.kernel[:, :, -1].unsqueeze(-1)
        self.retained = self.pushed = self.momentum_share = None
        if gates.retained is not None and not rule.pulls:
            self.retained = F.pad(gates.retained[:, :, :-1], (1, 0), value=1.0).unsqueeze(-1)
        if gates.pushed is not None and gates.momentum_share is not None:
            self.pushed = F.pad(gates.pushed[:, :, :-1], (1, 0)).unsqueeze(-1)
            self.momentum_share = gates.momentum_share.unsqueeze(-1)
        self.target = inputs.v if rule.bias is None else inputs.v - inputs.k - rule.bias
        if rule.activation is not None:
            self.q_retained = _times(inputs.q, self.retained)
            self.q_pushed = None if self.pushed is None else inputs.q * self.pushed
            self.raw_scores = torch.matmul(inputs.q, inputs.k.mT)
            self.scores = self.raw_scores * self.kernel
            self.k_written = inputs.k * self.share
            self.k_pushed = None if self.momentum_share is None else inputs.k * self.momentum_share

    def end(self, c: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """P_C, m_C and h_C of a chunk, [G, 1, 1]."""
        gates = self.gates
        retained, pushed = (None if g is None else g[c, :, -1:, None] for g in (gates.retained, gates.pushed))
        return retained, pushed, None if gates.carried is None else gates.carried[c, :, None, None]

    def place(self, name: str, c: int) -> Tensor:
        """Chunk c's part of a kept tensor; the same place again and again where nothing is kept."""
        found = self.kept[name]
        return found[c % found.shape[0]]

    def state(self, c: int) -> tuple[Maps, Maps]:
        """Where weights and momentum at the start of chunk c stand."""
        maps = range(self.rule.maps)
        weights = tuple(self.place(f"weight{i}", c) for i in maps)
        return weights, tuple(self.place(f"momentum{i}", c) for i in maps if f"momentum{i}" in self.kept)

    # --- forward ---

    def forward(self) -> Tensor:
        """All chunks from ``state(0)`` on; returns the shifted outputs [n, G, C, D]."""
        kept, rule = self.kept, self.rule
        kept["one"].fill_(1)
        for c in range(self.steps):
            self._read(c, *self._errors(c))
        p = kept["p"]
        torch.mul(kept["read"], 1 if self.retained is None else self.retained, out=p)
        if self.pushed is not None:
            p.addcmul_(kept["past"], self.pushed)
        _folded(p).baddbmm_(_folded(kept["match"] * self.kernel), _folded(kept["error"]), alpha=-1)
        if rule.gain is None or rule.bias is None:
            return p
        return torch.addcmul(self.x.q + rule.bias, normalise(p)[0], rule.gain)

    def _errors(self, c: int) -> tuple[Tensor, Tensor | None]:
        """The key pass: a, and the first map's error."""
        (first, *rest), _ = self.state(c)
        a, last = self.x.k[c], first
        if rest:
            a, last, z = self.place("a", c), rest[0], self.place("z", c)
            torch.bmm(self.x.k[c], first.mT, out=z)
            activation(str(self.rule.activation), z, out=a)
        o, error = self.place("o", c), self.kept["error"][c]
        torch.bmm(a, last.mT, out=o)
        gain = self.rule.gain
        if gain is None:
            torch.sub(o, self.target[c], out=error).mul_(2)
        else:
            n, mean, rstd = normalise(o)
            error.copy_(norm_backward(n.mul_(gain).sub_(self.target[c]).mul_(2 * gain), o, mean, rstd))
        if not rest:
            return a, None
        u, gp, e1 = self.place("u", c), self.place("slope", c), self.kept["e1"][0]
        torch.bmm(error, last, out=u)
        slope(str(self.rule.activation), self.kept["one"].expand_as(z), z, out=gp)
        return a, torch.mul(u, gp, out=e1)

    def _read(self, c: int, a: Tensor, e1: Tensor | None) -> None:
        """The queries through both maps, and the state at the chunk's end."""
        kept, (weights, momentum) = self.kept, self.state(c)
        b = self.x.q[c]
        if e1 is not None:
            h, b = self.place("h", c), self.kept["b"][0]
            torch.bmm(self.q_retained[c], weights[0].mT, out=h)
            if self.q_pushed is not None:
                h.baddbmm_(self.q_pushed[c], momentum[0].mT)
            h.baddbmm_(self.scores[c], e1, alpha=-1)
            activation(str(self.rule.activation), h, out=b)
        torch.bmm(b, weights[-1].mT, out=kept["read"][c])
        if momentum:
            torch.bmm(b, momentum[-1].mT, out=kept["past"][c])
        torch.bmm(b, a.mT, out=kept["match"][c])
        error = kept["error"][c]
        past = None if self.momentum_share is None else error * self.momentum_share[c]
        if e1 is not None:
            self._close(c, 0, (e1, self.k_written[c]), None if self.k_pushed is None else (e1, self.k_pushed[c]))
        self._close(c, self.rule.maps - 1, (error * self.share[c], a), None if past is None else (past, a))

    def _close(self, c: int, i: int, write: tuple[Tensor, Tensor], push: tuple[Tensor, Tensor] | None) -> None:
        """Map i at the chunk's end; the factors δ, a of what is written into weights and momentum."""
        (old, new), (retained, pushed, carried) = (self.place(f"weight{i}", j) for j in (c, c + 1)), self.end(c)
        if retained is None:
            new.copy_(old)
        elif self.rule.pulls and self.anchors is not None:
            torch.lerp(self.anchors[i].weight, old, retained, out=new)
        else:
            torch.mul(old, retained, out=new)
        if push is not None and pushed is not None and carried is not None:
            past, now = (self.place(f"momentum{i}", j) for j in (c, c + 1))
            new.addcmul_(past, pushed)
            torch.mul(past, carried, out=now).baddbmm_(push[0].mT, push[1], alpha=-1)
        new.baddbmm_(write[0].mT, write[1], alpha=-1)
        if self.anchors is not None:
            norm, scale, share = self.anchors[i].norm, self.place(f"scale{i}", c), self.place(f"of_norm{i}", c)
            found = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
            alive = found > norm * torch.finfo(found.dtype).eps
            scale.copy_(torch.where(alive, norm / found, 1))
            torch.mul(alive, self.anchors[i].inverse, out=share)
            new.mul_(scale)


def kept_layout(rule: ChunkRule, chunks: int, keep: bool, q: Tensor, hidden: int, momentum: bool) -> Layout:
    """What ``Segment`` writes: with ``keep`` all that the backward needs, else as little as the forward can do with."""
    rows, width, size = q.shape[0], q.shape[-1], rule.chunk_size
    depth = chunks if keep else 1
    shapes: dict[str, tuple[int, ...]] = {}
    # States first: where nothing is kept, they then stand at the same place whatever the number of chunks.
    outs = [hidden, width][-rule.maps :]
    for i, (out, into) in enumerate(zip(outs, [width, hidden][-rule.maps :])):
        shapes[f"weight{i}"] = (depth + 1, rows, out, into)
        if momentum:
            shapes[f"momentum{i}"] = (depth + 1, rows, out, into)
    shapes |= {"one": (1,), "o": (depth, rows, size, width), "match": (chunks, rows, size, size)}
    shapes |= dict.fromkeys(("error", "read", "past", "p"), (chunks, rows, size, width))
    if rule.maps == 2:
        shapes |= dict.fromkeys(("z", "a", "u", "slope", "h"), (depth, rows, size, hidden))
        shapes |= dict.fromkeys(("e1", "b"), (1, rows, size, hidden))
    if rule.projects:
        shapes |= {f"{name}{i}": (depth, rows, out, 1) for i, out in enumerate(outs) for name in ("scale", "of_norm")}
    return Layout(shapes, q.dtype.itemsize)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _folded(x: Tensor) -> Tensor:
    """[n, G, ·, ·] -> [n·G, ·, ·]."""
    return x.flatten(0, 1)
