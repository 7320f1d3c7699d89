"""The probe of a run: outer gradient norms by part of the model, and what its memories do with the last batch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from titans.hf import TitansForCausalLM
from titans.models import probe_memories

PARTS = {"gates": "memory gates", "memory": "memory", "attention": "attention", "ffn": "feed-forward"}


def probe(model: TitansForCausalLM, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the outer gradients, and the memories on the first row of a batch.

    A probe never ends a run: it leaves the memories out where the window is shorter than a chunk, in which hardly
    anything is written, and where one diverges, which the loss shows on all processes at once.

    Args:
        model: with the gradients of an optimizer step, not yet clipped.
        inputs: of its last forward pass, ``input_ids`` and perhaps ``state``.

    Returns:
        ``gradient_norms`` as `gradient_norms` gives them, and ``memory``, one `titans.models.MemoryReading` as a
        dictionary for each layer with a memory.
    """
    measured: dict[str, Any] = {"gradient_norms": gradient_norms(model)}
    ids, state = inputs["input_ids"][:1], inputs.get("state")
    if ids.shape[1] >= model.model.config.chunk_size:
        with suppress(FloatingPointError):
            readings = probe_memories(model.model, ids, None if state is None else state.select([0]))
            measured["memory"] = [asdict(reading) for reading in readings]
    return measured


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the outer gradient by part of the model: embedding, each of ``PARTS``, and the rest."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            words = name.split(".")
            part = next((title for word, title in PARTS.items() if word in words), "rest")
            parts.setdefault("embedding" if "embedding" in words else part, []).append(parameter.grad)
    return {part: torch.nn.utils.get_total_norm(gradients).item() for part, gradients in parts.items()}
