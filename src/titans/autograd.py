"""What every hand-written derivative needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def hand_written(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the ``backward`` of an autograd.Function: differentiable once, and computed without autocast.

    Called inside an autocast region, a backward pass would otherwise take its products in half precision, whatever the
    forward pass had.
    """

    @wraps(backward)
    def exact(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return once_differentiable(exact)


class _Same(torch.autograd.Function):
    """x; as transforms of `torch.func` and forward mode take it, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)


class _Once(_Same):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _Twice.apply(grad) if torch.is_grad_enabled() and grad.requires_grad else grad  # type: ignore[return-value]


class _Twice(_Same):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("a neural memory can be differentiated once: its gradients have no gradients")


def once(x: Tensor) -> Tensor:
    """x, of which gradients can be taken once; of these none, which is an error.

    The memory's own gradients are taken inside a call. Beyond two derivatives torch itself is wrong in silence (that of
    ``layer_norm``), and hand-written ones end.
    """
    return _Once.apply(x) if x.requires_grad and torch.is_grad_enabled() else x  # type: ignore[return-value]
