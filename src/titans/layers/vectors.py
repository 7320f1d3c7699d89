"""Layers on the few vectors of a decoding step: in C++ on a CPU, as any other call elsewhere.

A layer of another class, one with hooks, or with weights of another kind or dtype is called as it is.
"""

from __future__ import annotations

from torch import Tensor, nn

from titans.layers.feedforward import FeedForward
from titans.layers.module import Linear, RMSNorm, hooked
from titans.ops.memory.native import vectors
from titans.ops.place import Place


def compiled(place: Place, x: Tensor) -> bool:
    """May C++ take x [B, 1, ·], and all vectors of its dtype in this step?"""
    return place.once(("vectors", x.dtype), lambda: vectors.usable(x))


def plain(x: Tensor, *layers: nn.Module) -> bool:
    """Does nothing but the class say what these layers do to x: no hooks, and weights like x?"""
    for layer in layers:
        if hooked(layer) or type(layer) not in _KNOWN:
            return False
        for weight in layer._parameters.values():
            if weight is not None and not like(x, weight):
                return False
    return True


def like(x: Tensor, weight: Tensor) -> bool:
    """Is a weight an ordinary tensor of x's dtype, in a row, on the CPU?"""
    ordinary = type(weight) is nn.Parameter or type(weight) is Tensor
    return ordinary and weight.dtype == x.dtype and weight.is_contiguous() and weight.device.type == "cpu"


def step_linear(layer: nn.Module, x: Tensor, place: Place) -> Tensor:
    """``layer`` over x [B, n, in]."""
    if x.shape[0] * x.shape[1] <= vectors.ROWS and compiled(place, x) and plain(x, layer):
        return vectors.linear(x.contiguous(), layer.weight, layer.bias)  # type: ignore[arg-type]
    return layer(x)


def step_norm(norm: RMSNorm, x: Tensor, place: Place) -> Tensor:
    """``norm`` over x [B, 1, width]."""
    if compiled(place, x) and plain(x, norm):
        return vectors.rms_norm(x.contiguous(), norm.weight, norm.eps_of(x))
    return norm(x)


def step_feedforward(norm: RMSNorm, layer: FeedForward, x: Tensor, place: Place) -> Tensor:
    """x + layer(norm(x)) over x [B, 1, d_model]."""
    if x.shape[0] <= vectors.ROWS and compiled(place, x) and plain(x, norm, layer, layer.up, layer.down):
        return vectors.feedforward(x.contiguous(), norm.weight, layer.up.weight, layer.down.weight, norm.eps_of(x))
    return x + layer(norm(x))


_KNOWN = (Linear, FeedForward, RMSNorm)
