"""The backward pass of a segment of whole chunks, by hand. Legend as in fused_segment.py; ``d_x`` is x's cotangent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.fused_gates import GateGradients, Gradients
from titans.ops.memory.fused_segment import (
    Segment,
    activation,
    curvature,
    norm_backward,
    normalise,
    slope,
)
from titans.ops.memory.workspace import Layout


@dataclass(frozen=True)
class SegmentGradients:
    """Of q (shifted), k and v [n, G, C, D], of theta, eta and alpha [n, G, C], and of gain and bias [G, 1, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gradients
    gain: Tensor | None
    bias: Tensor | None


def scratch_layout(rule: ChunkRule, chunks: int, q: Tensor, hidden: int) -> Layout:
    """What ``SegmentBackward`` writes."""
    rows, width, size = q.shape[0], q.shape[-1], rule.chunk_size
    names = ["d_k", "d_q", "d_r", "last_written", "last_pushed"]
    shapes: dict[str, tuple[int, ...]] = {"d_a": (rows, size, hidden)}
    if rule.maps == 2:
        names += ["first_written", "first_pushed", "d_q_retained", "d_q_pushed"]
        shapes |= dict.fromkeys(("d_e1", "d_h", "d_z", "b", "e1"), (rows, size, hidden))
        shapes["d_scores"] = (chunks, rows, size, size)
        shapes["weight0"] = (rows, hidden, width)
    shapes[f"weight{rule.maps - 1}"] = (rows, width, hidden)
    return Layout(shapes | dict.fromkeys(names, (chunks, rows, size, width)), q.dtype.itemsize)


class SegmentBackward:
    """Walks a segment's chunks from the last to the first.

    Args:
        segment: after its ``forward`` with everything kept.
        d_y: of the shifted outputs, [n, G, C, D].
        d_weights, d_momentum: per map, of the state at the segment's end; overwritten with those at its start.
        scratch: the views of ``scratch_layout``.
    """

    def __init__(
        self,
        segment: Segment,
        d_y: Tensor,
        d_weights: list[Tensor],
        d_momentum: list[Tensor],
        scratch: dict[str, Tensor],
    ):
        self.s, self.rule, self.x, self.kept = segment, segment.rule, segment.x, segment.kept
        self.d_y, self.d_weights, self.d_momentum, self.out = d_y, d_weights, d_momentum, scratch
        self.name = str(self.rule.activation)
        self.d_gain = self.d_bias = None
        self.d_ends: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
        self._outputs()
        self._rebuild_errors()

    def run(self) -> SegmentGradients:
        for c in reversed(range(self.s.steps)):
            self._project(c)
            self._writes(c)
            self._carry(c)
            self._reads(c)
            self._keys(c)
        self.d_ends.reverse()
        return self._gather()

    # --- before the loop, all chunks at once ---

    def _outputs(self) -> None:
        """From the outputs to what was read: d_read, d_past, d_match and the kernel's share of it."""
        s, kept, p = self.s, self.kept, self.kept["p"]
        d_p = self.d_y
        if self.rule.gain is not None:
            n, mean, rstd = normalise(p)
            self.d_gain, self.d_bias = (self.d_y * n).sum((0, 2)), self.d_y.sum((0, 2))
            d_p = norm_backward(self.d_y * self.rule.gain, p, mean, rstd)
        d_match = torch.matmul(d_p, kept["error"].mT).neg_()
        self.d_kernel = d_match * kept["match"]
        self.d_match = d_match.mul_(s.kernel)
        self.d_error = torch.matmul((kept["match"] * s.kernel).mT, d_p).neg_()
        self.d_retained = None if s.retained is None else (d_p * kept["read"]).sum(-1)
        self.d_pushed = None if s.pushed is None else (d_p * kept["past"]).sum(-1)
        self.d_read = d_p if s.retained is None else d_p * s.retained
        self.d_past = None if s.pushed is None else d_p * s.pushed

    def _rebuild_errors(self) -> None:
        """What the forward pass had at hand on its way to the last map's errors."""
        s, error = self.s, self.kept["error"]
        self.error_written = error * s.share
        self.error_pushed = None if s.momentum_share is None else error * s.momentum_share
        if self.rule.gain is not None:
            self.n, self.mean, self.rstd = normalise(self.kept["o"])
            self.r = torch.addcmul(-s.target, self.n, self.rule.gain)
            self.g = self.r * (2 * self.rule.gain)
            self.g_along_n = (self.g * self.n).mean(-1, keepdim=True)

    # --- one chunk ---

    def _inner(self, c: int) -> Tensor:
        return self.kept["a"][c] if self.rule.maps == 2 else self.x.k[c]

    def _project(self, c: int) -> None:
        """Through the rows' scaling: W = s A with s = ‖A_0‖ / ‖A‖ per row."""
        for i, anchor in enumerate(self.s.anchors or ()):
            d_weight, weight, share = self.d_weights[i], self.kept[f"weight{i}"][c + 1], self.kept[f"of_norm{i}"][c]
            along = torch.mul(d_weight, weight, out=self.out[f"weight{i}"]).sum(-1, keepdim=True).mul_(share)
            anchor.d_norm.add_(along)
            d_weight.addcmul_(weight, along.mul_(share), value=-1).mul_(self.kept[f"scale{i}"][c])

    def _writes(self, c: int) -> None:
        """To both factors of the writes; ``d_a`` and ``d_e1`` are left with their signs turned."""
        out, a = self.out, self._inner(c)
        torch.bmm(a, self.d_weights[-1].mT, out=out["last_written"][c])
        torch.bmm(self.error_written[c], self.d_weights[-1], out=out["d_a"])
        if self.error_pushed is not None:
            torch.bmm(a, self.d_momentum[-1].mT, out=out["last_pushed"][c])
            out["d_a"].baddbmm_(self.error_pushed[c], self.d_momentum[-1])
        if self.rule.maps == 1:
            return
        e1 = torch.mul(self.kept["u"][c], self.kept["slope"][c], out=out["e1"])
        torch.bmm(e1, self.d_weights[0], out=out["first_written"][c])
        torch.bmm(self.s.k_written[c], self.d_weights[0].mT, out=out["d_e1"])
        if self.s.k_pushed is not None:
            torch.bmm(e1, self.d_momentum[0], out=out["first_pushed"][c])
            out["d_e1"].baddbmm_(self.s.k_pushed[c], self.d_momentum[0].mT)

    def _carry(self, c: int) -> None:
        """To P_C, m_C, h_C, to A_0, and to the state at the chunk's start as far as it is carried along."""
        retained, pushed, carried = self.s.end(c)
        weights, momentum = self.s.state(c)
        d_retained = None if retained is None else torch.zeros_like(retained)
        d_pushed, d_carried = (None if x is None else torch.zeros_like(x) for x in (pushed, carried))
        for i, (weight, d_weight) in enumerate(zip(weights, self.d_weights)):
            scratch = self.out[f"weight{i}"]
            if pushed is not None and carried is not None and d_pushed is not None and d_carried is not None:
                past, d_past = momentum[i], self.d_momentum[i]
                d_pushed += _dot(d_weight, past, scratch)
                d_carried += _dot(d_past, past, scratch)
                d_past.mul_(carried).addcmul_(d_weight, pushed)
            if retained is None or d_retained is None:
                continue
            if self.rule.pulls and self.s.anchors is not None:
                anchor = self.s.anchors[i]
                d_retained += _dot(d_weight, torch.sub(weight, anchor.weight, out=scratch), scratch)
                anchor.d_weight.addcmul_(d_weight, 1 - retained)
            else:
                d_retained += _dot(d_weight, weight, scratch)
            d_weight.mul_(retained)
        self.d_ends.append((d_retained, d_pushed, d_carried))

    def _reads(self, c: int) -> None:
        """Through the queries' way through both maps."""
        s, out, (weights, momentum) = self.s, self.out, self.s.state(c)
        two = self.rule.maps == 2
        a, b, d_b = self._inner(c), self.x.q[c], out["d_q"][c]
        if two:
            h, b, d_b = self.kept["h"][c], out["b"], out["d_h"]
            activation(self.name, h, out=b)
        torch.bmm(self.d_read[c], weights[-1], out=d_b)
        self.d_weights[-1].baddbmm_(self.d_read[c].mT, b)
        if self.d_past is not None:
            d_b.baddbmm_(self.d_past[c], momentum[-1])
            self.d_momentum[-1].baddbmm_(self.d_past[c].mT, b)
        d_b.baddbmm_(self.d_match[c], a)
        out["d_a"].baddbmm_(self.d_match[c].mT, b, beta=-1)
        if not two:
            return
        d_h = out["d_h"]
        slope(self.name, d_b, self.kept["h"][c], out=d_h)
        out["d_e1"].baddbmm_(s.scores[c].mT, d_h, beta=-1, alpha=-1)
        torch.bmm(d_h, out["e1"].mT, out=out["d_scores"][c])
        torch.bmm(d_h, weights[0], out=out["d_q_retained"][c])
        self.d_weights[0].baddbmm_(d_h.mT, s.q_retained[c])
        if s.q_pushed is not None:
            torch.bmm(d_h, momentum[0], out=out["d_q_pushed"][c])
            self.d_momentum[0].baddbmm_(d_h.mT, s.q_pushed[c])

    def _keys(self, c: int) -> None:
        """Through the errors and the key pass."""
        s, out, kept = self.s, self.out, self.kept
        weights, _ = s.state(c)
        a, d_a = self._inner(c), out["d_a"]
        d_error = self.d_error[c].addcmul_(out["last_written"][c], s.share[c], value=-1)
        if s.momentum_share is not None:
            d_error.addcmul_(out["last_pushed"][c], s.momentum_share[c], value=-1)
        if self.rule.maps == 2:
            d_z, d_e1 = out["d_z"], out["d_e1"]
            curvature(self.name, kept["z"][c], out=d_z, scratch=out["b"])
            d_z.mul_(d_e1).mul_(kept["u"][c])
            d_u = d_e1.mul_(kept["slope"][c])
            d_error.baddbmm_(d_u, weights[1].mT)
            self.d_weights[1].baddbmm_(kept["error"][c].mT, d_u)
        d_o = self._error(c, d_error)
        self.d_weights[-1].baddbmm_(d_o.mT, a)
        d_a.baddbmm_(d_o, weights[-1])
        if self.rule.maps == 1:
            out["d_k"][c] = d_a
            return
        d_z = out["d_z"].addcmul_(d_a, kept["slope"][c])
        torch.bmm(d_z, weights[0], out=out["d_k"][c])
        self.d_weights[0].baddbmm_(d_z.mT, self.x.k[c])

    def _error(self, c: int, d_error: Tensor) -> Tensor:
        """From the last map's error to its output; ``d_r`` is left as what 2 gain times it would be."""
        gain = self.rule.gain
        if gain is None:
            return torch.mul(d_error, 2, out=self.out["d_r"][c])
        o, n, mean, rstd = self.kept["o"][c], self.n[c], self.mean[c], self.rstd[c]
        d_g = self.out["d_r"][c].copy_(norm_backward(d_error, o, mean, rstd))
        along_n = (d_error * n).mean(-1, keepdim=True)
        along_e = (d_error * self.kept["error"][c]).mean(-1, keepdim=True)
        d_n = (d_error * self.g_along_n[c]).addcmul_(self.g[c], along_n).mul_(-rstd).addcmul_(d_g, 2 * gain * gain)
        return norm_backward(d_n, o, mean, rstd).addcmul_(n, rstd * along_e, value=-1)

    # --- after the loop, all chunks at once ---

    def _gather(self) -> SegmentGradients:
        s, out = self.s, self.out
        d_q, d_k, d_r = out["d_q"], out["d_k"], out["d_r"]
        d_share = -(out["last_written"] * self.kept["error"]).sum(-1)
        d_momentum_share = None
        if s.momentum_share is not None:
            d_momentum_share = -(out["last_pushed"] * self.kept["error"]).sum(-1)
        if self.rule.maps == 2:
            self._first_map(d_share, d_momentum_share)
        if self.rule.gain is not None:
            assert self.d_gain is not None and self.d_bias is not None
            self.d_gain += 2 * (self.r * d_r).sum((0, 2))
            d_r.mul_(2 * self.rule.gain)
            self.d_gain += (self.n * d_r).sum((0, 2))
            self.d_bias += d_r.sum((0, 2))
            d_q.add_(self.d_y)
            d_k.add_(d_r)
        gates = s.gates.backward(
            GateGradients(
                torch.cat((self.d_kernel[:, :, 1:], d_share.unsqueeze(2)), 2),
                self._shifted_back(s.gates.retained, self.d_retained, 0),
                self._shifted_back(s.gates.pushed, self.d_pushed, 1),
                None if s.gates.carried is None else torch.stack([e[2].flatten() for e in self.d_ends]),  # type: ignore[union-attr]
                d_momentum_share,
            )
        )
        gain, bias = (None if x is None else x.unsqueeze(1) for x in (self.d_gain, self.d_bias))
        return SegmentGradients(d_q, d_k, d_r.neg(), gates, gain, bias)

    def _first_map(self, d_share: Tensor, d_momentum_share: Tensor | None) -> None:
        """What the first map adds to queries, keys and gates."""
        s, out, x = self.s, self.out, self.x
        d_scores = out["d_scores"].neg_()
        self.d_kernel.addcmul_(d_scores, s.raw_scores)
        d_scores.mul_(s.kernel)
        torch.mul(out["d_q_retained"], 1 if s.retained is None else s.retained, out=out["d_q"])
        if self.d_retained is not None:
            self.d_retained += (out["d_q_retained"] * x.q).sum(-1)
        if s.pushed is not None and self.d_pushed is not None:
            self.d_pushed += (out["d_q_pushed"] * x.q).sum(-1)
            out["d_q"].addcmul_(out["d_q_pushed"], s.pushed)
        out["d_q"].flatten(0, 1).baddbmm_(d_scores.flatten(0, 1), x.k.flatten(0, 1))
        out["d_k"].flatten(0, 1).baddbmm_(d_scores.flatten(0, 1).mT, x.q.flatten(0, 1))
        out["d_k"].addcmul_(out["first_written"], s.share, value=-1)
        d_share -= (out["first_written"] * x.k).sum(-1)
        if s.momentum_share is not None and d_momentum_share is not None:
            out["d_k"].addcmul_(out["first_pushed"], s.momentum_share, value=-1)
            d_momentum_share -= (out["first_pushed"] * x.k).sum(-1)

    def _shifted_back(self, gate: Tensor | None, inside: Tensor | None, which: int) -> Tensor | None:
        """From reads, which see a gate one token later, and chunk ends to the gate's own tokens [n, G, C]."""
        if gate is None:
            return None
        ends = torch.stack([e[which].flatten() for e in self.d_ends]).unsqueeze(-1)  # type: ignore[union-attr]
        if inside is None:
            return F.pad(ends, (gate.shape[-1] - 1, 0))
        return torch.cat((inside[:, :, 1:], ends), 2)


def _dot(x: Tensor, y: Tensor, scratch: Tensor) -> Tensor:
    """Σ x y per row, [G, 1, 1]."""
    return torch.mul(x, y, out=scratch).sum((1, 2), keepdim=True)
