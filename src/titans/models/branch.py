"""The memory as a branch of a block, and how a block makes its parts from the configuration.

Legend: B batch, T tokens, P persistent tokens.
"""

from __future__ import annotations

import torch
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
    ) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
        """Outputs at x [B, T, d_model], the state, and outputs at P [B, P, d_model] for the rows that start here; None
        where none does."""
        starting = place.starting
        if self.persistent is None or not any(starting):
            y, state = self.memory.advance(x, state, place.lengths, store)
            return y, state, None
        prefix, lengths = self.persistent.n_tokens, place.lengths
        if state is not None and lengths is None and not all(starting) and self._in_step(state, starting):
            # Rows that start write P on their own and then march in step with the others.
            rows = [row for row, starts in enumerate(starting) if starts]
            first, fresh = self.memory.advance(self.persistent.P.expand(len(rows), -1, -1).to(x.dtype), None)
            y, state = self.memory.advance(x, state.put(rows, fresh), None, store)
            at = torch.tensor(rows, device=x.device)
            return y, state, first.new_zeros(x.shape[0], *first.shape[1:]).index_copy(0, at, first)
        joined = self.persistent(x)
        if store is not None:
            store = F.pad(store, (prefix, 0), value=True)
        if not all(starting):
            offsets = [0 if s else prefix for s in starting]
            joined = columns(joined, offsets, joined.shape[1])
            store = None if store is None else columns(store, offsets, store.shape[1])
        if lengths is not None or not all(starting):
            lengths = tuple(n + prefix * s for n, s in zip(place.counts, starting, strict=True))
        y, state = self.memory.advance(joined, state, lengths, store)
        return columns(y, [prefix * s for s in starting], x.shape[1]), state, y[:, :prefix]

    def _in_step(self, state: NeuralMemoryState, starting: tuple[bool, ...]) -> bool:
        """Do the rows that go on stand at the place in their chunk at which P leaves a new one?"""
        assert self.persistent is not None
        phase, chunk = self.persistent.n_tokens % self.memory.chunk_size, state.memory.chunk
        others = {p for p, starts in zip(state.memory.phases, starting, strict=True) if not starts}
        if chunk is not None and chunk.gates.write is not None:  # padding or tokens that are not stored came before
            return False
        return others == {phase} and (0 if chunk is None else chunk.width) == phase
