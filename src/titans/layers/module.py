"""Modules that start by themselves and say which of their parameters weight decay leaves alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from titans.ops.memory.native import around


def check_dtype(name: str, x: Tensor, own: torch.dtype) -> None:
    """Raise a ValueError unless ``x`` is of the weights' type; autocast casts, and rounded weights have other types."""
    if x.dtype != own and own.is_floating_point and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} must be {own} as the weights are, got {x.dtype}")


class Module(nn.Module):
    """Base of the library's modules.

    A constructor builds its children and ends with ``initialise``. ``reset_parameters`` does the same to a module that
    is already there: with the same seed it draws the same numbers, so that a model built on the meta device, moved with
    ``to_empty`` and reset equals one that was built in place.

    Attributes:
        undecayed: names of own parameters and child modules to which weight decay does not apply. (It never applies to
            parameters of less than two dimensions: gains, biases, scales.)
    """

    undecayed: ClassVar[tuple[str, ...]] = ()

    def initialise(self) -> None:
        """Give the module's own parameters, and children that shall differ from their own start, their first values."""

    def reset_parameters(self) -> None:
        """Start anew, everything below included."""
        for child in self.children():
            reset(child)
        self.initialise()


def hooked(module: nn.Module) -> bool:
    """Has a call of the module effects that its class does not know?"""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def reset(module: nn.Module) -> None:
    """``reset_parameters`` of a module, or of those inside a container that has none."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    else:
        for child in module.children():
            reset(child)


class RMSNorm(nn.RMSNorm):
    """x / RMS(x) · weight, on a CPU in one pass each forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and around.usable(x, self.weight):
            return around.norm(x, self.weight, self.eps_of(x))
        return super().forward(x)

    def eps_of(self, x: Tensor) -> float:
        """What is added to the mean square of x."""
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps


class Linear(nn.Linear):
    """A linear map without bias unless asked for; it starts normal with variance ``gain``² / fan-in.

    Activations then keep unit scale. Maps that add to the residual stream take a smaller ``gain``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, gain: float = 1.0):
        self.gain = gain
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
