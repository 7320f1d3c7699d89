"""What every token of a text does to every memory: surprise, inner loss and gates, by layer and head.

Legend: L layers with a memory, H heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.layers.neural_memory import NeuralMemory
from titans.models import ModelState, TitansModel
from titans.models.memorize import on_grid
from titans.models.probe import observed
from titans.names import check_kind
from titans.ops.memory import MemoryTrace

QUANTITIES = {
    "surprise": "‖g‖, the norm of the token's gradient",
    "loss": "inner loss at the weights of the chunk's start",
    "after": "inner loss at the weights of the chunk's end",
    "theta": "θ, the step size",
    "eta": "η, how much of the last surprise is carried on",
    "alpha": "α, how much is forgotten",
}


@dataclass(frozen=True)
class TextTrace:
    """A text and what it did.

    Attributes:
        ids: int64 [T].
        start: tokens that the stream had read before.
        layers: names of the memories, such as ``blocks.0``, L of them.
        values: quantity -> float32 [L, H, T]; NaN where a chunk is still open. A quantity that the rule has not is left
            out.
        nats: float32 [T], the model's own loss at each token; NaN for the first one, before which
            nothing of this text was read.
    """

    ids: np.ndarray
    start: int
    layers: tuple[str, ...]
    values: dict[str, np.ndarray]
    nats: np.ndarray


@torch.no_grad()
def trace_text(model: TitansModel, ids: np.ndarray, state: ModelState | None = None) -> TextTrace:
    """Read a text and note what every token does.

    Args:
        model: any variant with a memory; it is left as it was.
        ids: int64 [T], T ≥ 1.
        state: of one stream, to read on from; None starts one.

    Raises:
        ValueError: the model has no memory, or the state more than one stream.
    """
    check_kind("model", model, TitansModel, "a model of titans, no grafted decoder")
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be a non-empty array of integers [T], got {str(ids)[:60]}")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, NeuralMemory)]
    if not found:
        raise ValueError(f"model has no memory: its variant is {model.config.variant!r}")
    if state is not None and state.rows != 1:
        raise ValueError(f"memory holds {state.rows} streams, one is needed")
    start = 0 if state is None else state.seen[0]
    pieces: list[list[MemoryTrace]] = [[] for _ in found]
    nats, last = [], None
    for piece in on_grid([ids], start, model):
        with observed([module for _, module in found]) as seen:
            out = model(torch.from_numpy(piece[None].astype(np.int64)).to(model.embedding.weight.device), state=state)
        state = out.state
        for kept, (traces, _) in zip(pieces, seen, strict=True):
            kept.extend(_without_prefix(traces, len(piece)))
        logits, targets = out.logits[0].float().cpu(), torch.from_numpy(piece.astype(np.int64))
        if last is not None:
            nats.append(F.cross_entropy(last, targets[:1], reduction="none"))
        nats.append(F.cross_entropy(logits[:-1], targets[1:], reduction="none"))
        last = logits[-1:].clone()
    values = {}
    for quantity in QUANTITIES:
        parts = [[getattr(trace, quantity) for trace in traces] for traces in pieces]
        if parts[0][0] is not None:
            values[quantity] = np.stack([_joined(part) for part in parts])
    told = np.concatenate((np.full(1, np.nan, dtype=np.float32), torch.cat(nats).numpy()))
    names = tuple(".".join(name.split(".")[:2]) for name, _ in found)
    return TextTrace(np.asarray(ids), start, names, values, told)


def _without_prefix(traces: Sequence[MemoryTrace], tokens: int) -> list[MemoryTrace]:
    """The traces of the last ``tokens``: persistent tokens are read before a stream's first."""
    extra = sum(trace.surprise.shape[1] for trace in traces) - tokens
    first = {name: None if x is None else x[:, extra:] for name, x in vars(traces[0]).items()}
    return [replace(traces[0], **first), *traces[1:]]


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    """[1, t, H] each -> [H, T]."""
    return torch.cat(list(parts), 1)[0].T.float().cpu().numpy()
