"""The loss of a language model: which targets count, and the mean over them.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def targets_of(labels: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """Labels after the shift, [B, T - 1]: nothing is predicted from or at padding, nor across documents."""
    targets = labels[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    if documents is not None:
        targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], -100)
    return targets


def check_items(items: Any) -> None:
    """Raise a ValueError unless ``num_items_in_batch`` is None or one finite number above 0 (seen on CPUs alone)."""
    if isinstance(items, Tensor):
        seen = items.device.type == "cpu" and not torch.compiler.is_compiling()
        wrong = items.numel() != 1 or (seen and not 0 < items.item() < math.inf)
    else:
        wrong = items is not None and not (isinstance(items, int | float) and 0 < items < math.inf)
    if wrong:
        raise ValueError(f"num_items_in_batch must be positive, one finite number, got {items!r}")


def mean_nats(logits: Tensor, targets: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Mean nats over the targets of logits [B, T, V], or their sum over ``items``; 0 if there is none."""
    logits = logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum().clamp(min=1) if items is None else items)
