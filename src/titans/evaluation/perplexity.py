"""Loss by position while streaming, with the memory on, reset or off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.models import TitansModel
from titans.models.generation import check_logits
from titans.names import check_kind, unknown

MemoryMode = Literal["on", "reset", "off"]


def nats_by_position(
    model: TitansModel, batches: Iterable[Tensor], *, segment: int, memory: MemoryMode = "on"
) -> Tensor:
    """Mean negative log-likelihood of every position, read segment by segment.

    Args:
        model: any variant or baseline.
        batches: int64 [B, T] each, all with the same T; every row is a stream of its own.
        segment: tokens per call; only "reset" depends on it.
        memory: "on"; "reset" puts the memory back to its learned initial weights before every segment (attention
            caches, convolutions and positions go on); "off" never writes.

    Returns:
        float64 [T - 1] in nats: entry t is the loss of predicting token t + 1.

    Raises:
        ValueError: there is no batch, one of another shape, ``segment`` is no number from 1 on, or ``memory`` is none
            of the three.
        FloatingPointError: the model's logits are not finite.
    """
    was_training = model.training
    model.eval()
    total, rows = None, 0
    try:
        for batch in batches:
            found = nats_of_rows(model, batch, segment=segment, memory=memory)[0].sum(0)
            if total is not None and len(found) != len(total):
                raise ValueError(f"batches must all have the same T, got {len(total) + 1} and {len(found) + 1}")
            total = found if total is None else total + found
            rows += batch.shape[0]
    finally:
        model.train(was_training)
    if total is None:
        raise ValueError("batches must hold at least one batch")
    return total / rows


@torch.no_grad()
def nats_of_rows(model: TitansModel, ids: Tensor, *, segment: int, memory: MemoryMode = "on") -> tuple[Tensor, int]:
    """As `nats_by_position` for each row by itself, float64 [B, T - 1]; and the bytes of a row's state at the end."""
    check_kind("batches", ids, Tensor, "tensors [B, T]")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"batches must be non-empty [B, T], got {list(ids.shape)}")
    check_kind("segment", segment, int, "an integer")
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
    if memory not in get_args(MemoryMode):  # a misspelt "reset" would read on and show no difference
        raise ValueError(unknown("memory", memory, get_args(MemoryMode)))
    state, last, pieces = None, None, []
    for part in ids.split(segment, 1):
        if state is not None and memory == "reset":
            state = state.forget()
        store = torch.zeros_like(part) if memory == "off" else None
        out = model(part, state=state, store_mask=store)
        logits = out.logits if last is None else torch.cat((last, out.logits), 1)
        check_logits(out.logits)
        state, last = out.state, out.logits[:, -1:]
        pieces.append(_nats(logits[:, :-1], part[:, part.shape[1] - logits.shape[1] + 1 :]))
    return torch.cat(pieces, 1), 0 if state is None else state.nbytes // len(ids)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2).double(), targets, reduction="none")
