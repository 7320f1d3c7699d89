"""The memory as a branch of a block, and how a block makes its parts from the configuration.

Legend: B batch, T tokens, P persistent tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import NeuralMemory, NeuralMemoryState, PersistentMemory
from titans.models.config import TitansConfig
from titans.ops.place import Place
from titans.ops.ragged import columns


def make_persistent(config: TitansConfig) -> PersistentMemory | None:
    return PersistentMemory(config.n_persistent, config.d_model) if config.n_persistent else None


def make_memory(config: TitansConfig) -> NeuralMemory:
    return NeuralMemory(
        config.d_model,
        n_heads=config.memory_heads,
        chunk_size=config.chunk_size,
        use_decay=config.use_decay,
        miras=config.rule,
        conv_kernel=config.conv_kernel,
        qkv_activation=config.qkv_activation,
        theta_max=config.theta_max,
    )


class PrefixedMemory(nn.Module):
    """The memory over [P‖x]: persistent tokens are written once, at the start of a stream."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.persistent = make_persistent(config)
        self.memory = make_memory(config)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, place: Place, store: Tensor | None
    ) -> tuple[Tensor, NeuralMemoryState, Tensor]:
        """Outputs at x [B, T, d_model], the state, and outputs at [P‖x] for the rows that start here."""
        if self.persistent is None or not any(place.starting):
            y, state = self.memory.advance(x, state, place.lengths, store)
            return y, state, y
        prefix, lengths = self.persistent.n_tokens, place.lengths
        joined = self.persistent(x)
        if store is not None:
            store = F.pad(store, (prefix, 0), value=True)
        if not all(place.starting):
            offsets = [0 if s else prefix for s in place.starting]
            joined = columns(joined, offsets, joined.shape[1])
            store = None if store is None else columns(store, offsets, store.shape[1])
        if lengths is not None or not all(place.starting):
            lengths = tuple(n + prefix * s for n, s in zip(place.counts, place.starting, strict=True))
        y, state = self.memory.advance(joined, state, lengths, store)
        return columns(y, [prefix * s for s in place.starting], x.shape[1]), state, y
