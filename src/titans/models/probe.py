"""What the memories of a model do with a text: gates, weights, and what a write achieves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans.models.language_model import TitansModel
from titans.models.state import ModelState
from titans.ops.memory import Engine, MemoryTrace


@dataclass(frozen=True)
class MemoryReading:
    """One layer's memory over a text, means over tokens (persistent ones included), rows and heads.

    Attributes:
        theta, eta, alpha: the gates; None where the rule has none.
        half_life: of each head, the tokens after which forgetting alone halves a weight, ln 2 / mean(-ln(1 - α)); None
            without α.
        weight_norm: ‖A‖ over ‖A_0‖ after the last token, Frobenius norms over all maps.
        moved: ‖A - A_0‖ over ‖A_0‖ there.
        loss_before: the inner loss ℓ(M(k), v) of the tokens of closed chunks at the weights of their chunk's start.
        loss_after: the same at the weights of their chunk's end: what writing them achieved.
        surprise: ‖g_t‖, the norm of the gradient over all maps.
    """

    theta: float
    eta: float | None
    alpha: float | None
    half_life: tuple[float, ...] | None
    weight_norm: float
    moved: float
    loss_before: float
    loss_after: float
    surprise: float


@torch.no_grad()
def probe_memories(model: TitansModel, input_ids: Tensor, state: ModelState | None = None) -> list[MemoryReading]:
    """Read a text and look into every layer's memory; empty for the baselines.

    Args:
        model: any variant; it is left as it was, and others may use it meanwhile.
        input_ids: int64 [B, T], T at least the chunk size, without padding.
        state: where the streams stand, all rows at the same place; None starts new ones.

    Raises:
        ValueError: ids of another shape, rows at different places, or a chunk does not close, so that nothing is
            written.
    """
    if state is not None and len(set(state.seen)) > 1:
        raise ValueError(f"state must have all rows at the same place, got seen = {state.seen}")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        told = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor [B, T], got {told}")
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if memories and input_ids.shape[1] < model.config.chunk_size:
        raise ValueError(
            f"input_ids must have at least chunk_size = {model.config.chunk_size} tokens, got {input_ids.shape[1]}"
        )
    model, state = _aside(model, state)
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    with observed(memories) as seen:
        model(input_ids, state=state, logits_to_keep=1)
    return [_reading(memory, *pieces) for memory, pieces in zip(memories, seen, strict=True)]


def _aside(model: TitansModel, state: ModelState | None) -> tuple[TitansModel, ModelState | None]:
    """A second model on the same weights, and the state as its own: others may be using the model meanwhile."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, shared)
    if state is None:
        return copy, None
    model.check_state(state, state.rows)
    return copy, replace(state, origin=copy.origin)


@contextmanager
def observed(memories: Sequence[NeuralMemory]) -> Iterator[list[tuple[list[MemoryTrace], list[NeuralMemoryState]]]]:
    """While open, collect the trace of each memory's calls and the states it leaves; compiled code would not tell."""
    seen: list[tuple[list[MemoryTrace], list[NeuralMemoryState]]] = [([], []) for _ in memories]
    engines: list[Engine] = [memory.engine for memory in memories]
    handles = []
    for memory, (traces, states) in zip(memories, seen, strict=True):

        def observe(module, args, kwargs, output, traces=traces, states=states) -> None:
            traces.append(module.trace(*args, store_mask=kwargs.get("store_mask"), rows=kwargs.get("rows")))
            states.append(output[1])

        handles.append(memory.register_forward_hook(observe, with_kwargs=True))
        memory.engine = "chunked"
    try:
        yield seen
    finally:
        for memory, engine, handle in zip(memories, engines, handles, strict=True):
            memory.engine = engine
            handle.remove()


def _reading(memory: NeuralMemory, traces: list[MemoryTrace], states: list[NeuralMemoryState]) -> MemoryReading:
    def joined(name: str) -> Tensor | None:
        found = [value for trace in traces if (value := getattr(trace, name)) is not None]
        return torch.cat(found, 1) if found else None

    def mean(value: Tensor | None) -> float | None:
        return None if value is None else value.nanmean().item()

    alpha, after = joined("alpha"), joined("after")
    before = joined("loss")
    assert before is not None and after is not None
    weights = states[-1].memory.weights
    initial = [w.to(now.dtype) for w, now in zip(memory.initial_weights, weights, strict=True)]
    rows = weights[0].shape[0]
    size = _norm(initial)
    rates = None if alpha is None else (-torch.log1p(-alpha)).mean((0, 1)).tolist()
    return MemoryReading(
        theta=mean(joined("theta")),  # type: ignore[arg-type]
        eta=mean(joined("eta")),
        alpha=mean(alpha),
        half_life=None if rates is None else tuple(math.log(2) / rate if rate else math.inf for rate in rates),
        weight_norm=_norm(weights, rows) / size,
        moved=_norm([now - w for now, w in zip(weights, initial, strict=True)], rows) / size,
        loss_before=before[~after.isnan()].mean().item(),
        loss_after=mean(after),  # type: ignore[arg-type]
        surprise=mean(joined("surprise")),  # type: ignore[arg-type]
    )


def _norm(weights: Sequence[Tensor], rows: int = 1) -> float:
    """The Frobenius norm over heads and maps, its root mean square over the rows of the batch."""
    return math.sqrt(sum(float(w.float().square().sum()) for w in weights) / rows)
