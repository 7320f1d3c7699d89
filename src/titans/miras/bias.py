"""Attentional biases: what the memory is asked to get right, given by its error signal.

Legend: residual r = M(k) - v [..., D]; delta: Huber threshold, [..., 1] or [..., D].
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializationInfo, field_serializer
from torch import Tensor

from titans.miras.choice import BY_NAME, Choice

SMOOTHING = 1e-6
TINY = 1e-30


class Bias(Choice):
    """Axis 2, the inner objective ℓ as a function of the residual r = M(k) - v.

    ``learned_delta`` says that the layer shall learn a positive threshold per token and hand it over as ``delta``
    (otherwise None).
    """

    axis: ClassVar[str] = "bias"

    @property
    def step_scale(self) -> float:
        """A layer's default cap of θ, relative to l2's: less where errors are larger or jump."""
        return 1.0

    @abstractmethod
    def error(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        """e = ∂ℓ/∂M(k), shape [..., D]; the engines back-propagate it as the cotangent of M(k)."""

    def loss(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        """ℓ per token, shape [...], for traces only. Unless overridden ½ r·e, which is ℓ where e is linear in r."""
        return 0.5 * (residual * self.error(residual, delta)).sum(-1)

    @property
    def learned_delta(self) -> bool:
        return False

    @classmethod
    def parse(cls, value: Any) -> Any:
        """As ``Choice.parse``; a plain function of the residual becomes its :class:`ErrorSignal`."""
        if callable(value) and not isinstance(value, (cls, type)):
            return ErrorSignal(function=value)  # type: ignore[arg-type]
        return super().parse(value)


class L2(Bias):
    """ℓ = ‖r‖², e = 2r (Titans Eq. 12)."""

    name: ClassVar[str] = "l2"

    def error(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        return 2 * residual


class Lp(Bias):
    """ℓ = Σ|r|^p, e = p·sign(r)·|r|^{p-1} (MIRAS Eq. 10, Moneta Eq. 24).

    Below p = 2 smoothed as MIRAS does: sign(r) becomes tanh(10 r) and |r| becomes √(r² + 1e-6).
    """

    name: ClassVar[str] = "lp"
    p: float = Field(default=3.0, ge=1, le=16)

    @property
    def step_scale(self) -> float:
        """Equal to l2's at residuals of √2 per channel, two independent vectors of unit variance."""
        return min(1.0, 2 / self.p * 2 ** (1 - self.p / 2))

    def error(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        if self.p < 2:
            return self.p * torch.tanh(10 * residual) * (residual.square() + SMOOTHING).pow((self.p - 1) / 2)
        if self.p == 3:
            return 3 * residual * residual.abs()
        # The clamp keeps the derivative of a power between 0 and 1 finite where the residual is exactly 0.
        return self.p * residual * residual.abs().clamp(min=TINY).pow(self.p - 2)

    def loss(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        return residual.abs().pow(self.p).sum(-1)


class Huber(Bias):
    """Quadratic for small residuals, linear for large ones: outliers write no more than δ allows (MIRAS §5.2).

    ``form``: "coordinate", e = clamp(r, -δ, δ); "vector", e = r·min(1, δ/‖r‖); "mixture", e = r if ‖r‖ ≤ δ else
    δ·sign(r) (Yaad, Eq. 26). ``delta`` is a constant, or "learned": a positive gate per token.
    """

    name: ClassVar[str] = "huber"
    delta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["learned"] = 1.0
    form: Literal["coordinate", "vector", "mixture"] = "mixture"

    @property
    def learned_delta(self) -> bool:
        return self.delta == "learned"

    @property
    def step_scale(self) -> float:
        """The mixture's error never fades: it jumps from δ·sign(r) to a vector √D times shorter (docs/miras.md)."""
        return 1 / 16 if self.form == "mixture" else 1.0

    def error(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        limit = self._limit(residual, delta)
        if self.form == "coordinate":
            return torch.minimum(torch.maximum(residual, -limit), limit)
        norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        if self.form == "vector":
            return residual * (limit / torch.maximum(norm, limit))
        return torch.where(norm <= limit, residual, limit * residual.sign())

    def loss(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        """H(r) = ½r² up to δ, then δ(|r| - ½δ), of the coordinates or of the norm; the mixture's δ‖r‖₁ beyond δ."""
        limit = self._limit(residual, delta)
        norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        if self.form == "mixture":
            return torch.where(norm <= limit, 0.5 * residual.square(), limit * residual.abs()).sum(-1)
        size = residual.abs() if self.form == "coordinate" else norm
        return torch.where(size <= limit, 0.5 * size.square(), limit * (size - 0.5 * limit)).sum(-1)

    def _limit(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        return residual.new_tensor(self.delta) if delta is None else delta


class Robust(Bias):
    """The worst case over values shifted by up to Δ = ``radius``: ℓ = ½‖r‖² + Δ‖r‖ (MIRAS Eq. 17)."""

    name: ClassVar[str] = "robust"
    radius: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    def error(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        return residual * (1 + self.radius * (residual.square().sum(-1, keepdim=True) + SMOOTHING).rsqrt())

    def loss(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        square = residual.square().sum(-1)
        return 0.5 * square + self.radius * (square + SMOOTHING).sqrt()


class ErrorSignal(Bias):
    """Any function e(r) of the residual. It has no name of its own, so a configuration with it cannot be saved."""

    name: ClassVar[str] = "error_signal"
    function: Callable[[Tensor], Tensor]

    def error(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        return self.function(residual)

    @field_serializer("function")
    def _by_name(self, function: Callable[[Tensor], Tensor], info: SerializationInfo) -> str:
        if info.context == BY_NAME:
            return _describe(function)
        raise ValueError(
            f"bias {getattr(function, '__name__', function)!r} is a bare function: to save it, define a class derived "
            "from titans.miras.Bias with a name of its own"
        )


def _describe(function: Callable) -> str:
    """A function's name, and a hash of what it computes, so far as Python tells: two lambdas may share a name."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    code = getattr(function, "__code__", None)
    if code is None:
        return name
    cells = [repr(cell.cell_contents) for cell in function.__closure__ or ()]  # type: ignore[attr-defined]
    constants = [value for value in code.co_consts if not hasattr(value, "co_code")]  # inner functions carry addresses
    told = repr((code.co_code, constants, code.co_names, function.__defaults__, cells))  # type: ignore[attr-defined]
    return f"{name} {hashlib.sha256(told.encode()).hexdigest()[:16]}"
