"""Memory architectures: what a memory computes from its maps, and how an error travels back through it.

A network never touches weights. It is written once, in terms of ``apply(i, x)`` ("map i, at whatever weights the caller
means"), and so serves the plain reference, the key pass at the chunk's start and the dual-form reads alike.
Shapes: x, outputs and errors are [..., tokens, width].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titans.autograd import hand_written
from titans.miras.choice import Choice

Apply = Callable[[int, Tensor], Tensor]
Activation = Literal["gelu", "silu"]


def activate(name: Activation, x: Tensor) -> Tensor:
    return F.gelu(x) if name == "gelu" else F.silu(x)


class _GeluBackward(torch.autograd.Function):
    """error · gelu'(x), whose own backward needs gelu''(x) = φ(x) (2 - x²): half the passes of autograd's rule."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(error, x)
        return torch.ops.aten.gelu_backward(error, x)

    @staticmethod
    @hand_written
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        error, x = ctx.saved_tensors
        square = x.square()
        curvature = (2 - square).mul_(square.mul_(-0.5).exp_()).mul_(error).mul_(grad).mul_((2 * math.pi) ** -0.5)
        return torch.ops.aten.gelu_backward(grad, x), curvature


def activate_backward(name: Activation, error: Tensor, x: Tensor) -> Tensor:
    """error * activation'(x), differentiable once more."""
    if name == "gelu":
        return _GeluBackward.apply(error, x)  # type: ignore[return-value]
    gate = torch.sigmoid(x)
    return error * (gate * (1 + x * (1 - gate)))


class Network(Choice):
    """Axis 1, the memory architecture f_W; with ``residual_norm`` the memory is M(x) = x + LN(f_W(x)) (MIRAS §5.3)."""

    axis: ClassVar[str] = "architecture"
    residual_norm: bool = True

    @property
    def step_scale(self) -> float:
        """A layer's default cap of θ, relative to that of a network of two maps."""
        return 1.0

    @property
    def layers(self) -> int:
        """Depth: maps on the longest path through the network; unless overridden, all maps count."""
        return len(self.shapes(1))

    @abstractmethod
    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        """Shape of each map for one head of ``width`` channels: (out, in) for a matrix, (width,) for a diagonal."""

    def initial(self, width: int, heads: int) -> tuple[Tensor, ...]:
        """Random weights to start from, [heads, …] per map, that keep the size of what passes through."""
        shapes = self.shapes(width)
        return tuple(torch.randn(heads, *s) * (s[-1] ** -0.5 if len(s) == 2 else 1) for s in shapes)

    @abstractmethod
    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        """f_W(x), calling ``apply(i, input)`` exactly once for every map, in order."""

    @abstractmethod
    def errors(self, error: Tensor, outputs: Sequence[Tensor], transpose: Apply) -> tuple[Tensor, ...]:
        """The error at the output of every map.

        Args:
            error: ∂ℓ/∂f_W(x).
            outputs: what ``apply`` returned for each map in ``forward``.
            transpose: ``transpose(i, d)`` is map i transposed, applied to d.
        """


class Vector(Network):
    """f_W(x) = w ⊙ x: one weight per channel."""

    name: ClassVar[str] = "vector"

    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        return ((width,),)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        return apply(0, x)

    def errors(self, error: Tensor, outputs: Sequence[Tensor], transpose: Apply) -> tuple[Tensor, ...]:
        return (error,)


class Matrix(Network):
    """f_W(x) = W x: linear attention's state; without the norm and without momentum, the (gated) delta rule."""

    name: ClassVar[str] = "matrix"

    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        return ((width, width),)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        return apply(0, x)

    def errors(self, error: Tensor, outputs: Sequence[Tensor], transpose: Apply) -> tuple[Tensor, ...]:
        return (error,)


class MLP(Network):
    """f_W(x) = W_n σ(… σ(W_1 x)), n = ``depth`` maps with hidden width ``expansion`` times the head's (Titans §3.1)."""

    name: ClassVar[str] = "mlp"
    depth: int = Field(default=2, ge=2, le=16)
    expansion: float = Field(default=4, gt=0, le=64)
    activation: Activation = "gelu"

    @property
    def step_scale(self) -> float:
        """Half for every further map: the steps of all maps act on one output, each through those after it."""
        return 2.0 ** (2 - self.depth)

    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        hidden = max(1, round(self.expansion * width))
        return ((hidden, width), *((hidden, hidden),) * (self.depth - 2), (width, hidden))

    def initial(self, width: int, heads: int) -> tuple[Tensor, ...]:
        """The maps between two activations twice as large: of small inputs, either activation passes on half.

        Without that a memory of depth 4 fades to a thirtieth, and the norm behind it steps as much further.
        """
        first, *middle, last = super().initial(width, heads)
        return first, *(2 * w for w in middle), last

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        for i in range(self.depth - 1):
            x = activate(self.activation, apply(i, x))
        return apply(self.depth - 1, x)

    def errors(self, error: Tensor, outputs: Sequence[Tensor], transpose: Apply) -> tuple[Tensor, ...]:
        found = [error]
        for i in range(self.depth - 1, 0, -1):
            found.append(activate_backward(self.activation, transpose(i, found[-1]), outputs[i - 1]))
        return tuple(reversed(found))


class GatedMLP(Network):
    """f_W(x) = W_down (σ(W_gate x) ⊙ W_up x), the SwiGLU form."""

    name: ClassVar[str] = "gated_mlp"
    expansion: float = Field(default=4, gt=0, le=64)
    activation: Activation = "silu"

    @property
    def layers(self) -> int:
        return 2

    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        hidden = max(1, round(self.expansion * width))
        return ((hidden, width), (hidden, width), (width, hidden))

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        return apply(2, activate(self.activation, apply(0, x)) * apply(1, x))

    def errors(self, error: Tensor, outputs: Sequence[Tensor], transpose: Apply) -> tuple[Tensor, ...]:
        gate, up, _ = outputs
        hidden = transpose(2, error)
        return activate_backward(self.activation, hidden * up, gate), hidden * activate(self.activation, gate), error
