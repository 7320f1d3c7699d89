"""Whole chunks with a backward pass by hand, in torch operations: every device, no compiler.

Autograd over the chunk loop keeps every intermediate and adds gradients up in passes of their own. Here a chunk's
gradients are accumulated inside the matrix products, the large tensors live in memory that is used again, and what does
not depend on the carried weights is computed for several chunks at once (fused_segment.py, fused_backward.py).

Legend: G batch times heads, T = n C tokens, D head width, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.autograd import hand_written
from titans.ops.memory.chunk_rule import ChunkRule, Maps, check_run, head_gates
from titans.ops.memory.fused_backward import SegmentBackward, SegmentGradients, scratch_layout
from titans.ops.memory.fused_segment import NORM_EPS, Anchor, Inputs, Segment, kept_layout
from titans.ops.memory.tokens import Tokens
from titans.ops.memory.workspace import Layout, borrow

MEMORY_BUDGET = 1 << 30  # bytes
SEGMENT_TOKENS = 256


@torch.compiler.disable
def run_chunks(
    rule: ChunkRule,
    tokens: Tokens,
    weights: Maps,
    momentum: Maps,
    *,
    memory_budget: int | None = None,
) -> tuple[Tensor, Maps, Maps]:
    """Read and write whole chunks, all rows in step, from the weights of the first chunk's start on.

    Args:
        rule: what is computed, with A_0 and the wrapper's gain and bias.
        tokens: q, k, v [G, n*C, D], float32 or float64; gates θ, η, α [G, n*C], η or α None switches that term off;
            write [G, n*C], 0 where a token leaves weights and momentum alone (θ = 0, α = 0, η = 1 there, too), else 1;
            not differentiated.
        weights: per map [G, out, in], as the state holds them: with sphere and anchored already scaled.
        momentum: likewise; empty without eta.
        memory_budget: bytes of intermediates to keep for the backward pass. Where they take more, only the state at the
            start of every √n-th chunk or so is kept and the rest computed again: a third more products. None: 1 GiB, on
            a GPU a sixteenth of its memory.

    Returns:
        y [G, n*C, D], and weights and momentum after the last chunk.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    check_run(rule, tokens, weights, momentum)
    q, k, v, (theta, eta, alpha, write) = tokens.q, tokens.k, tokens.v, head_gates(tokens)
    given = (q, k, v, theta, eta, alpha, write, rule.gain, rule.bias, *weights, *momentum, *(rule.anchors or ()))
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    budget = _budget(q.device) if memory_budget is None else memory_budget
    plan = _plan(rule, q, weights, bool(momentum), needed, budget)
    y, *state = _Run.apply(plan, *given)  # type: ignore[misc]
    return y, tuple(state[: rule.maps]), tuple(state[rule.maps :])


@dataclass(frozen=True)
class _Plan:
    """How a call is cut: chunks per segment, and whether the forward pass keeps what the backward pass needs."""

    rule: tuple[Any, Any, int]
    chunks: int
    needed: bool
    keep: bool

    def rows(self, given: Sequence[Tensor | None]) -> _Call:
        """The arguments of ``_Run`` by their names."""
        tokens, (gain, bias), maps = given[:7], given[7:9], [x for x in given[9:] if x is not None]
        count = 1 if self.rule[0] is None else 2
        weights, momentum = maps[:count], maps[count : 2 * count] if given[4] is not None else []
        anchors = maps[len(weights) + len(momentum) :]
        rule = ChunkRule(*self.rule, tuple(anchors) or None, gain, bias)
        return _Call(rule, Inputs(*tokens), tuple(weights), tuple(momentum))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Call:
    rule: ChunkRule
    inputs: Inputs
    weights: Maps
    momentum: Maps

    def anchors(self) -> list[Anchor] | None:
        return None if self.rule.anchors is None else [Anchor.of(a) for a in self.rule.anchors]

    @property
    def hidden(self) -> int:
        return self.weights[-1].shape[-1]

    def segments(self, chunks: int) -> Iterator[tuple[int, int]]:
        """First token and end of every segment."""
        tokens, step = self.inputs.q.shape[1], chunks * self.rule.chunk_size
        return ((start, min(start + step, tokens)) for start in range(0, tokens, step))

    def cut(self, start: int, stop: int) -> Inputs:
        """One segment's tokens, chunk-major."""
        q, *others = self.inputs
        cut = (None if x is None else _chunked(x[:, start:stop], self.rule.chunk_size) for x in others)
        return Inputs(_chunked(_shifted(q, start, stop), self.rule.chunk_size), *cut)  # type: ignore[arg-type]

    def block(self, start: int, stop: int, keep: bool) -> Tensor:
        """Memory for a segment's forward pass."""
        return borrow(self.layout(start, stop, keep).numel, self.inputs.q.dtype, self.inputs.q.device)

    def layout(self, start: int, stop: int, keep: bool) -> Layout:
        chunks = (stop - start) // self.rule.chunk_size
        return kept_layout(self.rule, chunks, keep, self.inputs.q, self.hidden, bool(self.momentum))

    def segment(self, start: int, stop: int, anchors: list[Anchor] | None, block: Tensor, keep: bool) -> Segment:
        kept = self.layout(start, stop, keep).views(block)
        return Segment(self.rule, self.cut(start, stop), anchors, kept)

    def last_read(self, q: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The last token's read, [G, 1, D], at the final weights."""
        x = q
        if self.rule.activation is not None:
            x = torch.bmm(x, weights[0].mT)
            x = F.gelu(x) if self.rule.activation == "gelu" else F.silu(x)
        x = torch.bmm(x, weights[-1].mT)
        if self.rule.gain is None or self.rule.bias is None:
            return x
        return q + F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * self.rule.gain + self.rule.bias


class _Run(torch.autograd.Function):
    """The whole call as one node; its tensors are q, k, v, gates, gain, bias, weights, momentum, anchors in a row."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *given: Tensor | None) -> tuple[Tensor, ...]:
        call = plan.rows(given)
        rows, tokens, width = call.inputs.q.shape
        y = call.inputs.q.new_empty(rows, tokens + 1, width)
        anchors, state = call.anchors(), (*call.weights, *call.momentum)
        blocks: list[Tensor] = []
        starts: list[Tensor] = []
        for start, stop in call.segments(plan.chunks):
            if plan.keep or not blocks:
                blocks.append(call.block(start, stop, plan.keep))
            if plan.needed and not plan.keep:
                starts += [x.clone() for x in state]
            segment = call.segment(start, stop, anchors, blocks[-1], plan.keep)
            _set_state(segment, state)
            _unchunk(segment.forward(), y[:, start:stop])
            weights, momentum = segment.state(segment.steps)
            state = (*weights, *momentum)
        state = tuple(x.clone() for x in state)
        y[:, tokens:] = call.last_read(call.inputs.q[:, -1:], state[: call.rule.maps])
        if plan.needed:
            ctx.plan, ctx.counts = plan, (len(given), len(state))
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*given, *state, *(blocks if plan.keep else starts))
        return (y[:, 1:], *state)

    @staticmethod
    @hand_written
    def backward(ctx: Any, d_y: Tensor | None, *d_state: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, (inputs, states) = ctx.saved_tensors, ctx.counts
        call = ctx.plan.rows(given[:inputs])
        final, saved = given[inputs : inputs + states], given[inputs + states :]
        d_y = torch.zeros_like(call.inputs.q) if d_y is None else d_y
        carried = [
            torch.zeros_like(f) if d is None else d.clone(memory_format=torch.contiguous_format)
            for f, d in zip(final, d_state)
        ]
        return (None, *_Backward(ctx.plan, call, carried).run(d_y, final, saved))


class _Backward:
    """The backward pass of one call.

    Args:
        carried: cotangents of the final weights and momentum; overwritten.
    """

    def __init__(self, plan: _Plan, call: _Call, carried: list[Tensor]):
        self.plan, self.call, self.carried = plan, call, carried
        x = call.inputs
        rows, tokens, width = x.q.shape
        self.d_q = x.q.new_empty(rows, tokens + 1, width)
        self.d_k, self.d_v = torch.empty_like(x.k), torch.empty_like(x.v)
        self.d_gates = [None if g is None else torch.empty_like(g) for g in (x.theta, x.eta, x.alpha)]
        self.d_norm: list[Tensor | None] = [None, None]
        self.anchors = call.anchors()

    def run(self, d_y: Tensor, final: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients of ``_Run``'s tensors."""
        self._last_read(d_y[:, -1:], final)
        call, plan = self.call, self.plan
        segments = list(call.segments(plan.chunks))
        block = None if plan.keep else call.block(*segments[0], keep=True)
        scratch = self._scratch(*segments[0])
        for i, (start, stop) in reversed(list(enumerate(segments))):
            segment = call.segment(start, stop, self.anchors, saved[i] if block is None else block, keep=True)
            if block is not None:
                count = len(self.carried)
                _set_state(segment, saved[i * count : (i + 1) * count])
                segment.forward()
            chunks = segment.steps
            views = {name: x if x.dim() == 3 else x[:chunks] for name, x in scratch.items()}
            maps = call.rule.maps
            d_read = _chunked(_shifted(d_y, start, stop), call.rule.chunk_size)
            walk = SegmentBackward(segment, d_read, self.carried[:maps], self.carried[maps:], views)
            self._store(walk.run(), start, stop)
        anchors = () if self.anchors is None else tuple(a.gradient() for a in self.anchors)
        return self.d_q[:, 1:], self.d_k, self.d_v, *self.d_gates, None, *self.d_norm, *self.carried, *anchors

    def _scratch(self, start: int, stop: int) -> dict[str, Tensor]:
        chunks = (stop - start) // self.call.rule.chunk_size
        q = self.call.inputs.q
        layout = scratch_layout(self.call.rule, chunks, q, self.call.hidden)
        return layout.views(borrow(layout.numel, q.dtype, q.device))

    def _last_read(self, d_y: Tensor, final: Sequence[Tensor]) -> None:
        """The last token's read once more, for its gradients."""
        call = self.call
        with torch.enable_grad():
            learned = [x for x in (call.rule.gain, call.rule.bias) if x is not None]
            leaves = [x.detach().requires_grad_() for x in (call.inputs.q[:, -1:], *learned, *final[: call.rule.maps])]
            rule = call.rule if not learned else _with_norm(call.rule, leaves[1], leaves[2])
            weights = leaves[1 + len(learned) :]
            read = _Call(rule, call.inputs, (), ()).last_read(leaves[0], weights)
            d_q, *rest = torch.autograd.grad(read, leaves, d_y)
        self.d_q[:, -1:] = d_q
        # A copy: what autograd returns may be d_y itself.
        self.d_norm = [*(x.clone(memory_format=torch.contiguous_format) for x in rest[: len(learned)]), None, None][:2]
        for carried, found in zip(self.carried, rest[len(learned) :]):
            carried += found

    def _store(self, found: SegmentGradients, start: int, stop: int) -> None:
        _unchunk(found.q, self.d_q[:, start:stop])
        _unchunk(found.k, self.d_k[:, start:stop])
        _unchunk(found.v, self.d_v[:, start:stop])
        for whole, part in zip(self.d_gates, found.gates):
            if whole is not None and part is not None:
                _unchunk(part, whole[:, start:stop])
        for whole, part in zip(self.d_norm, (found.gain, found.bias)):
            if whole is not None and part is not None:
                whole += part


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return MEMORY_BUDGET
    return torch.cuda.get_device_properties(device).total_memory // 16


def _plan(rule: ChunkRule, q: Tensor, weights: Maps, momentum: bool, needed: bool, budget: int) -> _Plan:
    chunks = q.shape[1] // rule.chunk_size
    segment = min(chunks, max(1, SEGMENT_TOKENS // rule.chunk_size))
    bare = (rule.activation, rule.retention, rule.chunk_size)
    if not needed:
        return _Plan(bare, segment, False, False)
    hidden = weights[-1].shape[-1]
    kept = -(-chunks // segment) * kept_layout(rule, segment, True, q, hidden, momentum).numel
    if kept * q.dtype.itemsize <= budget:
        return _Plan(bare, segment, True, True)
    # m chunks per segment cost m chunks' intermediates and chunks / m states: least where both are equal.
    one = kept_layout(rule, 1, True, q, hidden, momentum).numel
    state = sum(w.numel() for w in weights) * (2 if momentum else 1)
    return _Plan(bare, min(chunks, max(1, round(math.sqrt(chunks * state / one)))), True, False)


def _with_norm(rule: ChunkRule, gain: Tensor, bias: Tensor) -> ChunkRule:
    return ChunkRule(rule.activation, rule.retention, rule.chunk_size, rule.anchors, gain, bias)


def _set_state(segment: Segment, state: Sequence[Tensor]) -> None:
    """Copy weights and momentum to where the segment starts from."""
    weights, momentum = segment.state(0)
    for place, x in zip((*weights, *momentum), state):
        if place.data_ptr() != x.data_ptr():
            place.copy_(x)


def _shifted(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens start - 1 to stop - 2, zeros before the first."""
    return x[:, start - 1 : stop - 1] if start else F.pad(x[:, : stop - 1], (0, 0, 1, 0))


def _chunked(x: Tensor, size: int) -> Tensor:
    """[G, n*C, ...] -> contiguous [n, G, C, ...]."""
    return x.unflatten(1, (-1, size)).transpose(0, 1).contiguous()


def _unchunk(x: Tensor, out: Tensor) -> None:
    """[n, G, C, ...] into ``out`` [G, n*C, ...]."""
    out.unflatten(1, (x.shape[0], x.shape[2])).copy_(x.transpose(0, 1))
