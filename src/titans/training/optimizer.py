"""AdamW with the right parameters decayed, and the cosine schedule with warm-up."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def undecayed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of ``model`` that weight decay leaves alone.

    Decay is for matrices that map activations, so everything with fewer than two dimensions (norm gains, biases,
    scales) is left out, and so is what a module names in its class attribute ``undecayed: tuple[str, ...]``: own
    parameters or child modules, the latter with all that is below them. A tied parameter counts as undecayed wherever
    one of its places is.

    Args:
        model: any module.

    Raises:
        AttributeError: a module names something that it does not have.
    """
    found = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    for module in model.modules():
        for name in getattr(module, "undecayed", ()):
            part = getattr(module, name)
            if part is not None:  # an option that is switched off
                found.update(part.parameters() if isinstance(part, nn.Module) else [part])
    return found


def build_optimizer(
    model: nn.Module,
    lr: float = 4e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``model``, each in exactly one of two groups.

    Args:
        model: any module; frozen parameters are left out.
        lr: peak learning rate, > 0. Default 4e-4 (Titans §5.1).
        weight_decay: decay of the first group, ≥ 0. Default 0.1.
        betas: AdamW's moment decays. Default (0.9, 0.95).

    Returns:
        The optimizer, its first group decayed and its second (`undecayed_parameters`) not.

    Raises:
        ValueError: when the model has no trainable parameter, or ``weight_decay`` is out of range.
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: must be at least 0, got {weight_decay}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient, there is nothing to train")
    undecayed = undecayed_parameters(model)
    groups = [
        {"params": [p for p in trained if p not in undecayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if p in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)


def get_cosine_schedule_with_warmup(
    optim: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float = 0.1,
) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then half a cosine down to ``min_lr_ratio`` of it.

    Step s (from 0) has the factor (s + 1) / warmup_steps during warm-up, so that no step has rate zero; the factor is
    1 at s = warmup_steps and ``min_lr_ratio`` from s = total_steps on.

    Args:
        optim: the optimizer whose rate is the peak.
        warmup_steps: length of the warm-up, ≥ 0.
        total_steps: length of the run, ≥ 1.
        min_lr_ratio: last rate over the peak, in [0, 1]. Default 0.1.

    Returns:
        A scheduler to be stepped once after every optimizer step.

    Raises:
        ValueError: when an argument is outside its range.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: must be at least 0, got {warmup_steps}")
    if total_steps < 1:
        raise ValueError(f"total_steps: must be at least 1, got {total_steps}")
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio: must be between 0 and 1, got {min_lr_ratio}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optim, factor)
