"""Models of equal size."""

from __future__ import annotations

import torch

from titans.models import TitansConfig, build_model, count_parameters


def parameters(config: TitansConfig) -> int:
    """Learned numbers of the model that ``config`` describes, without making it."""
    # All blocks are alike, so two of them tell the size of any number at once.
    with torch.device("meta"):
        one, two = (count_parameters(build_model(config.model_copy(update={"n_layers": n}))) for n in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def match_parameters(config: TitansConfig, size: int) -> TitansConfig:
    """``config`` with the width of its feed-forward chosen so that it has ``size`` parameters.

    That width moves in steps of 8, so half a step (12 · d_model · n_layers parameters) may remain.

    Raises:
        ValueError: with the least feed-forward the model would still be larger.
    """
    width, layers = config.d_model, config.n_layers
    smallest = config.model_copy(update={"ffn_mult": _multiple(8, width)})
    least = parameters(smallest)
    steps = round((size - least) / (24 * width * layers))
    if steps < 0:
        raise ValueError(f"{config.variant}: {least} parameters with the least feed-forward are more than {size}")
    return config.model_copy(update={"ffn_mult": _multiple(8 + 8 * steps, width)})


def _multiple(hidden: int, width: int) -> float:
    """The ``ffn_mult`` that gives this hidden width (see `titans.layers.feedforward.FeedForward`)."""
    return (hidden - 0.5) * 3 / (2 * width)  # it is rounded up: half an element below keeps clear of rounding errors
