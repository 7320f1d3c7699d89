"""The long-term memory as a layer for any sequence of vectors.

Legend: B batch, T tokens, H memory heads, D head width (d_model / H), C chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.convolution import ShortConvolution
from titans.memory.gates import MemoryGates
from titans.miras import MirasConfig
from titans.miras.config import resolve_miras
from titans.ops.memory import (
    Engine,
    MemoryState,
    MemoryTrace,
    State,
    check_finite,
    default_steps,
    memory_read,
    memory_scan,
    memory_start,
    memory_trace,
)
from titans.ops.place import Place
from titans.ops.ragged import compact, restore, take

OWN = 0.2  # share of a token itself in its key at the start
FULL_PACE_CHUNK = 16  # tokens; a default step size shrinks in longer chunks


@dataclass(frozen=True)
class NeuralMemoryState(State):
    """The memory's weights, the last inputs of the convolution [B, K-1, 3·d_model], and the tokens seen per row."""

    memory: MemoryState
    tail: Tensor | None
    seen: tuple[int, ...]


def default_heads(d_model: int) -> int:
    """The largest divisor h of d_model that leaves heads at least 64 wide; 1 if there is none."""
    return max((h for h in range(1, d_model // 64 + 1) if d_model % h == 0), default=1)


def default_theta_max(miras: MirasConfig, head_dim: int, chunk_size: int) -> float:
    """``pace`` / D · min(1, 16 / C): gradients of one chunk are all taken at the same weights, and add up."""
    return miras.pace / head_dim * min(1, FULL_PACE_CHUNK / chunk_size)


class NeuralMemory(nn.Module):
    """A small network per sample and head whose weights learn, by gradient descent, what it reads.

    Each token is projected to a query, a key and a value (causal convolution, ℓ2-normalised q and k, v no longer than
    √D under the wrapper x + LN(.)) and to its own step size θ, momentum decay η and forgetting α. The memory takes a
    gradient step on ℓ(M(k), v) and is then read at q; the read is normalised, gated and projected.

    Args:
        d_model: width of x.
        n_layers: depth of the memory network; 1 is the matrix memory. Default: as ``miras`` says.
        n_heads: memory heads; default: the largest that leaves heads at least 64 wide.
        chunk_size: C; gradients are taken at the weights of the chunk's start. Gates act per token for every C.
        d_hidden: total hidden width of the memory networks, split over the heads; default 4·d_model.
        use_momentum: carry past surprise along (Titans Eq. 10). Default: as ``miras`` says.
        use_decay: forgetting gate α (Titans Eq. 13); default True.
        miras: the four choices; default ``MirasConfig.steady()``.
        conv_kernel: kernel of the convolution after each projection; 0 for none.
        qkv_activation: "none" or "silu" after the convolution.
        theta_max: cap of θ / (1 - η), so that momentum makes no step longer; of θ without momentum and with muon.
            Default ``miras.pace`` / D · min(1, 16 / C), so 1/D for the Titans rule at C ≤ 16: gradients of one
            chunk are all taken at the same weights, and add up where its tokens are alike.

    Attributes:
        engine: "chunked"; set it to "compiled" to run whole chunks through ``torch.compile``.
        observer: called with x and the states before and after, each time the memory has read something; see
            `titans.models.probe_memories`.

    Raises:
        ValueError: a width that does not divide, or a shorthand that contradicts ``miras``.

    Source: Titans §3.1-3.2 and §4.4.
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int | None = None,
        n_heads: int | None = None,
        chunk_size: int = 64,
        *,
        d_hidden: int | None = None,
        use_momentum: bool | None = None,
        use_decay: bool | None = None,
        miras: MirasConfig | None = None,
        conv_kernel: int = 4,
        qkv_activation: Literal["none", "silu"] = "none",
        theta_max: float | None = None,
    ):
        super().__init__()
        n_heads = default_heads(d_model) if n_heads is None else n_heads
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model = {d_model}, got {n_heads}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if conv_kernel < 0:
            raise ValueError(f"conv_kernel must be at least 0, got {conv_kernel}")
        if theta_max is not None and not 0 < theta_max < math.inf:
            raise ValueError(f"theta_max must be positive and finite, got {theta_max}")
        if qkv_activation not in ("none", "silu"):
            raise ValueError(f"qkv_activation must be 'none' or 'silu', got {qkv_activation!r}")
        self.d_model, self.n_heads, self.chunk_size = d_model, n_heads, chunk_size
        self.head_dim = d_model // n_heads
        self.miras = resolve_miras(miras, n_layers, d_hidden, use_momentum, d_model, n_heads)
        self.use_decay = use_decay is not False
        self.engine: Engine = "chunked"
        self.observer: Callable[[Tensor, NeuralMemoryState | None, NeuralMemoryState], None] | None = None
        self.qkv_activation = qkv_activation
        self.theta_max = default_theta_max(self.miras, self.head_dim, chunk_size) if theta_max is None else theta_max

        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = ShortConvolution(3 * d_model, conv_kernel) if conv_kernel else None
        self.gates = MemoryGates(d_model, n_heads, self.head_dim, self.miras, self.use_decay, self.theta_max)
        plain = self.miras.architecture.initial(self.head_dim, n_heads)
        self.initial_weights = nn.ParameterList(self.miras.retention.initial(w) for w in plain)
        if self.miras.algorithm.per_chunk:
            self.log_steps = nn.ParameterList(s.log() for s in default_steps(tuple(self.initial_weights)))
        if self.miras.architecture.residual_norm:
            self.norm_gain = nn.Parameter(torch.ones(n_heads, self.head_dim))
            self.norm_bias = nn.Parameter(torch.zeros(n_heads, self.head_dim))
        self.read_norm = nn.RMSNorm(d_model)
        self.read_gate = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.recall_what_followed()

    @torch.no_grad()
    def recall_what_followed(self) -> None:
        """Let the key of a token start as the query of the token before it.

        Queries and keys are projected alike, and the convolution of keys looks one token further back. A new memory
        thus files every token under what came before it, and a query recalls what once followed the like of the last
        tokens: the pattern that copying needs, and that training finds late (docs/results/lasting.md). Without a
        convolution of at least two tokens there is nothing to look back with, and nothing happens.
        """
        if self.conv is None or self.conv.kernel < 2:
            return
        queries, keys, _ = self.qkv.weight.chunk(3)
        keys.copy_(queries)
        queries, keys, _ = self.conv.weight.chunk(3, -1)
        queries[0] = 0
        keys[:-1] = queries[1:]
        keys[-1] = OWN * queries[-1]  # not 0: a stream's first token has nothing else to be filed under

    @overload
    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = ...,
        return_state: Literal[False] = ...,
        mask: Tensor | None = ...,
        store_mask: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = ...,
        *,
        return_state: Literal[True],
        mask: Tensor | None = ...,
        store_mask: Tensor | None = ...,
    ) -> tuple[Tensor, NeuralMemoryState]: ...

    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
        store_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, NeuralMemoryState]:
        """Write and read every token.

        Args:
            x: [B, T, d_model], T ≥ 1.
            state: where an earlier call stopped; None starts a new stream.
            return_state: also return the state after the last token.
            mask: [B, T] bool, False for padding: it does nothing and its output is zero.
            store_mask: [B, T] bool, False for tokens that are read but not written.

        Returns:
            y [B, T, d_model], and the state if asked for.

        Raises:
            FloatingPointError: reading without gradients, the memory diverged.
        """
        self._check(x, state)
        order = lengths = None
        for name, flags in (("mask", mask), ("store_mask", store_mask)):
            if flags is not None and (flags.dtype != torch.bool or flags.shape != x.shape[:2]):
                raise ValueError(
                    f"{name} must be bool [B, T] = {list(x.shape[:2])}, got {flags.dtype} {list(flags.shape)}"
                )
        inputs = x
        if mask is not None and not bool(mask.all()):
            order, lengths = compact(mask)
            inputs = take(x, order)
            store_mask = None if store_mask is None else take(store_mask, order)
        y, state = self.advance(inputs, state, lengths, store_mask)
        check_finite(state, "this layer")
        if order is not None and mask is not None:
            y = restore(y, order, mask)
        return (y, state) if return_state else y

    def advance(
        self,
        x: Tensor,
        state: NeuralMemoryState | None,
        lengths: tuple[int, ...] | None = None,
        store_mask: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """``forward`` for a right-padded batch with ``lengths`` real tokens per row; what the models call."""
        read, state = self.scan(x, state, lengths, store_mask)
        return self.emit(read, x), state

    def scan(
        self,
        x: Tensor,
        state: NeuralMemoryState | None,
        lengths: tuple[int, ...] | None = None,
        store_mask: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """``advance`` up to the reads [B, T, H, D], which ``emit`` turns into outputs."""
        place = _going_on(x, state, lengths)
        q, k, v, tail = self._project(x, state, place)
        read, memory = memory_scan(
            q, k, v, lengths=lengths, store_mask=store_mask, chunk_size=self.chunk_size,
            state=None if state is None else state.memory, engine=self.engine, **self._writing(x),
        )  # fmt: skip
        after = NeuralMemoryState(memory, tail, place.after)
        if self.observer is not None:
            self.observer(x, state, after)
        return read, after

    def retrieve(self, x: Tensor, state: NeuralMemoryState | None = None) -> Tensor:
        """Read x [B, T, d_model] from the memory as the state left it; nothing is written."""
        self._check(x, state)
        q, _, _, _ = self._project(x, state, _going_on(x, state))
        return self.emit(memory_read(q, state=None if state is None else state.memory, **self._rule()), x)

    def trace(self, x: Tensor, state: NeuralMemoryState | None = None) -> MemoryTrace:
        """Per-token surprise ‖g_t‖, inner loss, θ, η, α, each [B, T, H], while reading x from ``state`` on."""
        self._check(x, state)
        q, k, v, _ = self._project(x, state, _going_on(x, state))
        memory = None if state is None else state.memory
        return memory_trace(q, k, v, state=memory, chunk_size=self.chunk_size, **self._writing(x))

    def start(self, x: Tensor, state: NeuralMemoryState | None) -> NeuralMemoryState:
        """``state`` with nothing left implicit: what a new stream begins with stands in it as tensors."""
        seen = (0,) * x.shape[0] if state is None else state.seen
        memory = memory_start(
            x.shape[0], weights=tuple(self.initial_weights), miras=self.miras, chunk_size=self.chunk_size,
            state=None if state is None else state.memory, dtype=x.dtype,
        )  # fmt: skip
        tail = None if self.conv is None else self.conv.start(x, None if state is None else state.tail, seen)
        return NeuralMemoryState(memory, tail, seen)

    def emit(self, read: Tensor, x: Tensor) -> Tensor:
        """Normalise, gate by x and project a read [B, T, H, D] -> [B, T, d_model]."""
        return self.out(self.read_norm(read.flatten(2)) * torch.sigmoid(self.read_gate(x)))

    def read(self, q: Tensor, state: MemoryState | None) -> Tensor:
        """Read queries [B, T, H, D] (see ``normalise``) from a state of the bare memory."""
        return memory_read(q, state=state, **self._rule())

    def normalise(self, x: Tensor) -> Tensor:
        """Projected queries or keys [B, T, d_model] -> unit vectors per head [B, T, H, D]."""
        if self.qkv_activation == "silu":
            x = F.silu(x)
        return F.normalize(x.unflatten(-1, (self.n_heads, self.head_dim)), dim=-1, eps=1e-12)

    def _project(
        self, x: Tensor, state: NeuralMemoryState | None, place: Place
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        projected, tail = self.qkv(x), None
        if self.conv is not None:
            projected, tail = self.conv(projected, None if state is None else state.tail, place)
        q, k, v = projected.chunk(3, -1)
        if self.qkv_activation == "silu":
            v = F.silu(v)
        return self.normalise(q), self.normalise(k), self._limit(v.unflatten(-1, (self.n_heads, self.head_dim))), tail

    def _limit(self, v: Tensor) -> Tensor:
        """Values [B, T, H, D], the longer ones cut to √D: what the wrapper x + LN(.) returns is about that long.

        The error of a much longer value hardly fades, however often it is written, and its pull is a step size beyond
        the cap of θ. Training grows values without end, since what is read is normalised (docs/results/lasting.md). A
        network without the wrapper can return what it likes: nothing is cut.
        """
        if not self.miras.architecture.residual_norm:
            return v
        longest = self.head_dim**0.5
        return v * (longest / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(longest))

    def _writing(self, x: Tensor) -> dict:
        """The arguments of ``memory_scan`` that only writing needs, and those of ``_rule``."""
        theta, eta, alpha, delta = self.gates(x)
        steps = None
        if self.miras.algorithm.per_chunk:
            # θ / θ_max is what scales a step here (math.md §4).
            steps = tuple(s.exp() / self.theta_max for s in self.log_steps)
        return {"theta": theta, "eta": eta, "alpha": alpha, "delta": delta, "steps": steps, **self._rule()}

    def _rule(self) -> dict:
        norm = (self.norm_gain, self.norm_bias) if self.miras.architecture.residual_norm else None
        return {"weights": tuple(self.initial_weights), "miras": self.miras, "norm": norm}

    def _check(self, x: Tensor, state: NeuralMemoryState | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model or 0 in x.shape:
            raise ValueError(f"x must be a non-empty [B, T, {self.d_model}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if state is not None and not isinstance(state, NeuralMemoryState):
            raise ValueError(f"state must be a NeuralMemoryState, got {type(state).__name__}")
        if state is not None and len(state.seen) != x.shape[0]:
            raise ValueError(f"state has {len(state.seen)} rows, x has {x.shape[0]}")


def _going_on(x: Tensor, state: NeuralMemoryState | None, lengths: tuple[int, ...] | None = None) -> Place:
    return Place((0,) * x.shape[0] if state is None else state.seen, x.shape[1], lengths)
