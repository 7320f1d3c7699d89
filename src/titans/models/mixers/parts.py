"""How a mixer makes its parts from the configuration, and the memory as a branch over [P‖x].

Legend: B batch, T tokens, P persistent tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from titans.layers.attention import Attention, AttentionStart
from titans.layers.decoding import StepNeuralMemory, begin_memory, end_memory, step_memory, unstepped
from titans.layers.module import Module
from titans.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans.layers.persistent_memory import PersistentMemory
from titans.models.config import TitansConfig
from titans.ops.place import Place
from titans.ops.rows import Rows, prefixed


def make_persistent(config: TitansConfig) -> PersistentMemory | None:
    return PersistentMemory(config.n_persistent, config.d_model) if config.n_persistent else None


def make_memory(config: TitansConfig) -> NeuralMemory:
    return NeuralMemory(
        config.d_model,
        n_heads=config.memory_heads,
        head_dim=config.mem_head_dim,
        chunk_size=config.chunk_size,
        use_decay=config.use_decay,
        miras=config.rule,
        conv_kernel=config.conv_kernel,
        qkv_activation=config.qkv_activation,
        theta_max=config.theta_max,
    )


def make_attention(config: TitansConfig, window: int | None, itself: int | None = None) -> Attention:
    return Attention(
        config.d_model,
        config.attention_heads,
        window,
        config.rope_base,
        gain=config.residual_gain,
        conv_kernel=config.attention_conv,
        start=AttentionStart(config.attention_induction, itself),
    )


class PrefixedMemory(Module):
    """The memory over [P‖x]: persistent tokens are written once, at the start of every stream."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.persistent = make_persistent(config)
        self.memory = make_memory(config)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, rows: Rows, store: Tensor | None
    ) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
        """Read and write [P‖x].

        Returns:
            outputs at x [B, T, d_model], the state, and outputs at P [1, P, d_model], which are the same for every
            stream that begins; None where none does.
        """
        if self.persistent is None:
            return *self.memory(x, state, return_state=True, store_mask=store, rows=rows), None
        layout = prefixed(rows, self.persistent.n_tokens)
        joined = layout.join(x, self.persistent.P.to(x.dtype))
        stored = None if store is None else layout.join(store, store.new_ones(self.persistent.n_tokens))
        y, after = self.memory(joined, state, return_state=True, store_mask=stored, rows=layout.rows)
        return layout.cut(y), after, layout.prefix(y)

    @property
    def prefix(self) -> int:
        """P."""
        return 0 if self.persistent is None else self.persistent.n_tokens

    def unstepped(self) -> str | None:
        return unstepped(self.memory)

    def begin_steps(self, state: NeuralMemoryState, seen: Sequence[int]) -> tuple[StepNeuralMemory, Tensor | None]:
        """Buffers of the memory, rows without a token having read P; and outputs at P as a call returns them."""
        first, fresh = None, [row for row, n in enumerate(seen) if not n]
        if self.persistent is not None and fresh:
            prefix = self.persistent.P.unsqueeze(0)
            first, read = self.memory(prefix, return_state=True, rows=Rows.whole((0,), self.prefix))
            state = state.put(fresh, read.select([0] * len(fresh)))
        return begin_memory(self.memory, state, [n + self.prefix for n in seen]), first

    def step(self, x: Tensor, state: StepNeuralMemory, place: Place) -> tuple[Tensor, StepNeuralMemory]:
        return step_memory(self.memory, x, state, place, self.prefix)

    def end_steps(self, state: StepNeuralMemory, seen: Sequence[int]) -> NeuralMemoryState:
        """Rows without a token are new streams again, whose call reads P once more."""
        return end_memory(state, [n + self.prefix if n else 0 for n in seen])
