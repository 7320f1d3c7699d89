"""Models of equal size."""

from __future__ import annotations

import torch

from titans.models import TitansConfig, build_model, count_parameters


def parameters(config: TitansConfig) -> int:
    """Learned numbers of the model that ``config`` describes, without making it."""
    with torch.device("meta"):
        return count_parameters(build_model(config))


def match_parameters(config: TitansConfig, like: TitansConfig) -> TitansConfig:
    """``config`` with the width of its feed-forward chosen so that it has as many parameters as ``like``.

    That width moves in steps of 8, so half a step (12 · d_model · n_layers parameters) may remain.

    Raises:
        ValueError: without any feed-forward the model would still be larger.
    """
    width, layers = config.d_model, config.n_layers
    smallest = config.model_copy(update={"ffn_mult": _multiple(8, width)})
    steps = round((parameters(like) - parameters(smallest)) / (24 * width * layers))
    if steps < 0:
        raise ValueError(f"{config.variant}: {parameters(smallest)} parameters are more than {parameters(like)}")
    return config.model_copy(update={"ffn_mult": _multiple(8 + 8 * steps, width)})


def _multiple(hidden: int, width: int) -> float:
    """The ``ffn_mult`` that gives this hidden width (see `titans.layers.feedforward.FeedForward`)."""
    return (hidden - 0.5) * 3 / (2 * width)  # it is rounded up: half an element below keeps clear of rounding errors
