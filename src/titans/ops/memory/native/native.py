"""The C++ scan as torch operators, and ``run_chunks`` on top of them.

Legend: G batch times heads, T = n C tokens, D head width, N elements of a row's state (weights of all maps, then
momentum).
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans.ops.memory.chunk_rule import ChunkRule, Maps, check_run, head_gates
from titans.ops.memory.native.build import library
from titans.ops.memory.native.vectors import pack
from titans.ops.memory.tokens import Tokens
from titans.ops.memory.workspace import borrow

MEMORY_BUDGET = 1 << 30  # bytes
ACTIVATIONS = (None, "gelu", "silu")
RETENTIONS = ("weight_decay", "sphere", "anchored")


def run_chunks(
    rule: ChunkRule,
    tokens: Tokens,
    weights: Maps,
    momentum: Maps,
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[Tensor, Maps, Maps]:
    """As ``titans.ops.memory.fused.run_chunks``, on the CPU, in compiled code.

    Raises:
        ValueError: an argument that does not fit, named.
        RuntimeError: the compiled code cannot be had (see ``unavailable``), or no memory is left.
    """
    check_run(rule, tokens, weights, momentum)
    q, k, v, (theta, eta, alpha, write) = tokens.q, tokens.k, tokens.v, head_gates(tokens)
    if q.device.type != "cpu":
        raise ValueError(f"the native engine computes on the CPU, q is on {q.device}")
    state, anchors = _join((*weights, *momentum)), None if rule.anchors is None else _join(rule.anchors)
    norm = None if rule.gain is None or rule.bias is None else torch.cat((rule.gain, rule.bias), 1)
    given = (q, k, v, theta, eta, alpha, write, norm, state, anchors)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    whole = tuple(None if x is None else x.contiguous() for x in given)
    hidden = weights[-1].shape[-1]
    choice = (ACTIVATIONS.index(rule.activation), RETENTIONS.index(rule.retention), rule.chunk_size, hidden)
    every, keep = _plan(_shape(whole, *choice, 1, False), needed, memory_budget * 8 // torch.finfo(q.dtype).bits)
    y, end, _, _ = torch.ops.titans.memory_scan(*whole, *choice, every, keep)
    sizes = [w[0].numel() for w in (*weights, *momentum)]
    maps = tuple(x.view_as(w) for x, w in zip(end.split(sizes, 1), (*weights, *momentum)))
    return y, maps[: rule.maps], maps[rule.maps :]


def _join(maps: Maps) -> Tensor:
    """[G, ·] of all maps in a row."""
    return torch.cat([w.flatten(1) for w in maps], 1)


@dataclass(frozen=True)
class _Shape:
    """As ``Shape`` in row.h."""

    rows: int
    chunks: int
    size: int
    width: int
    hidden: int
    activation: int
    retention: int
    norm: int
    momentum: int
    every: int
    keep: int

    @property
    def state(self) -> int:
        return self.hidden * self.width * (2 if self.activation else 1) * (1 + self.momentum)

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.every)

    @property
    def kept(self) -> tuple[int, int]:
        """Elements of states between segments and of activations that the forward pass leaves."""
        states = self.rows * (self.segments - 1) * self.state
        return states, self.rows * (self.chunks if self.keep else 1) * self.acts

    @property
    def acts(self) -> int:
        hidden = 3 * self.size * self.hidden if self.activation else 0
        rows = self.width + (self.hidden if self.activation else 0)
        return -(-(hidden + 5 * self.size * self.width + self.size**2 + 2 * self.size + 2 * rows) // 16) * 16


def _shape(
    given: tuple[Tensor | None, ...], activation: int, retention: int, size: int, hidden: int, every: int, keep: bool
) -> _Shape:
    q, eta, norm = given[0], given[4], given[7]
    assert q is not None
    flags = int(norm is not None), int(eta is not None)
    return _Shape(
        q.shape[0], q.shape[1] // size, size, q.shape[2], hidden, activation, retention, *flags, every, int(keep)
    )


def _plan(shape: _Shape, needed: bool, budget: int) -> tuple[int, bool]:
    """Chunks between two states that are kept, and whether all activations are; ``budget`` in elements.

    Between two kept states the backward pass works the others out again, from the activations if there are any. For
    short chunks that is cheaper than to write and read them: a state then is larger than a chunk's activations.
    """
    if not needed:
        return shape.chunks, False
    every = max(1, min(shape.chunks, 64 // shape.size, 16))
    if sum(replace(shape, every=every, keep=1).kept) <= budget:
        return every, True
    return max(1, min(shape.chunks, round(math.sqrt(shape.chunks * shape.state / (shape.state + shape.acts))))), False


# --- operators ---

_TOKENS = (
    "Tensor q, Tensor k, Tensor v, Tensor theta, Tensor? eta, Tensor? alpha, Tensor? write, Tensor? norm, "
    "Tensor state, Tensor? anchors"
)
_CHOICE = "int activation, int retention, int size, int hidden, int every, bool keep"
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(*given: Any) -> Outputs:
    """y [G, T, D], the end state [G, N], and what the backward pass needs: states and activations."""
    tensors, shape = given[:10], _shape(given[:10], *given[10:])
    q, state = tensors[0], tensors[8]
    outputs = (torch.empty_like(q), torch.empty_like(state), *(borrow(n, q.dtype, q.device) for n in shape.kept))
    _call(shape, (*tensors, *outputs), back=False)
    return outputs  # type: ignore[return-value]


def _forward_fake(*given: Any) -> Outputs:
    shape, q, state = _shape(given[:10], *given[10:]), given[0], given[8]
    points, acts = (q.new_empty(n) for n in shape.kept)
    return torch.empty_like(q), torch.empty_like(state), points, acts


def _backward(*given: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, theta, eta, alpha, norm, state and anchors; empty where there is no such tensor."""
    d_y, d_end, end, points, acts = given[:5]
    tensors, shape = given[5:15], _shape(given[5:15], *given[15:])
    found = _backward_fake(*given)
    outputs = [None if x.numel() == 0 else x for x in found]
    _call(shape, (*tensors, None, end, points, acts, d_y, d_end, *outputs), back=True)
    return found


def _backward_fake(*given: Any) -> tuple[Tensor, ...]:
    q, k, v, theta, eta, alpha, _, norm, state, anchors = given[5:15]
    wanted = (q, k, v, theta, eta, alpha, norm, state, anchors)
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x) for x in wanted)


def _call(shape: _Shape, tensors: tuple[Tensor | None, ...], back: bool) -> None:
    dtype = next(x.dtype for x in tensors if x is not None)
    sizes, pointers = pack(astuple(shape), tensors)
    compiled = library()
    assert compiled.titans_scan_acts(sizes) == shape.acts
    if compiled.titans_scan(sizes, pointers, dtype == torch.float64, back, torch.get_num_threads()):
        raise RuntimeError("the native engine got no memory for its scratch space")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.choice = inputs[10:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *output[1:])


def _gradient(ctx: Any, d_y: Tensor | None, d_end: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, end, points, acts = ctx.saved_tensors
    d_y = torch.zeros_like(tensors[0]) if d_y is None else d_y.contiguous()
    d_end = torch.zeros_like(tensors[8]) if d_end is None else d_end.contiguous()
    found = torch.ops.titans.memory_scan_backward(d_y, d_end, end, points, acts, *tensors, *ctx.choice)
    q, k, v, theta, eta, alpha, norm, state, anchors = (x if x.numel() else None for x in found)
    return q, k, v, theta, eta, alpha, None, norm, state, anchors, *(None for _ in ctx.choice)


_scan = torch.library.custom_op(
    "titans::memory_scan",
    _forward,
    mutates_args=(),
    schema=f"({_TOKENS}, {_CHOICE}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_scan_backward = torch.library.custom_op(
    "titans::memory_scan_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor d_y, Tensor d_end, Tensor end, Tensor points, Tensor acts, {_TOKENS}, {_CHOICE}) -> "
    f"({', '.join(['Tensor'] * 9)})",
)
_scan.register_fake(_forward_fake)
_scan_backward.register_fake(_backward_fake)
_scan.register_autograd(_gradient, setup_context=_setup)
