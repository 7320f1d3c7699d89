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
