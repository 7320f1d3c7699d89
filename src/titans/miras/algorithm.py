"""Memory algorithms: how the gradients of the inner objective become writes."""

from __future__ import annotations

from typing import ClassVar

from titans.miras.choice import Choice


class Algorithm(Choice):
    """Axis 4, the inner optimiser. ``momentum`` says whether past surprise S is carried along."""

    axis: ClassVar[str] = "algorithm"
    momentum: ClassVar[bool] = False


class GradientDescent(Algorithm):
    """S_t = -θ_t g_t: the MIRAS variants' own choice."""

    name: ClassVar[str] = "gradient_descent"


class Momentum(Algorithm):
    """S_t = η_t S_{t-1} - θ_t g_t: past and momentary surprise (Titans Eqs. 9-10)."""

    name: ClassVar[str] = "momentum"
    momentum: ClassVar[bool] = True
