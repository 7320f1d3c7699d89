"""The watch for non-finite values: which tensor went bad first, and what is said of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is not finite; the message names the step, the tensor and the checkpoint to go back to."""


def first_bad_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter, in the model's order, with a non-finite entry; None if all are finite."""
    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def first_bad_gradient(model: nn.Module) -> str:
    """The first parameter, in the model's order, whose gradient has a non-finite entry."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return "none alone, the norm over all gradients overflows"


def first_bad_activation(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Run a batch once more and name the first parameter or module output that is not finite.

    Args:
        model: the model, at the weights that gave the bad loss.
        inputs: what its forward is called with.
    """
    parameter = first_bad_parameter(model)
    if parameter is not None:
        return f"parameter {parameter}"
    bad: list[str] = []
    # What went bad may make a memory diverge, which ends the forward pass: the first bad tensor is known by then.
    with _hooked(model, bad), torch.no_grad(), suppress(FloatingPointError):
        model(**inputs)
    return f"output of {bad[0]}" if bad else "the loss itself"


@contextmanager
def _hooked(model: nn.Module, bad: list[str]) -> Iterator[None]:
    """While open, collect the names of modules in the order in which they return something non-finite."""

    def check(name: str, output: Any) -> None:
        tensors = (x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor))
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            bad.append(name)

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: check(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
