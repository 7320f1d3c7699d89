"""The long-term memory as a layer for any sequence of vectors.

Legend: B batch, T tokens, H memory heads, D head width, C chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.convolution import ShortConvolution, start_keys_one_token_behind
from titans.layers.gates import MemoryGates, check_count, default_heads, default_theta_max
from titans.layers.module import Linear, Module, RMSNorm, check_dtype
from titans.layers.vectors import plain
from titans.miras import MirasConfig
from titans.miras.config import resolve_miras
from titans.ops.memory import (
    Engine,
    MemoryState,
    MemoryTrace,
    Rule,
    Tokens,
    check_engine,
    check_finite,
    default_steps,
    engine_for,
    initial_weights,
    memory_trace,
    read,
    read_weights,
    scan,
    stored,
)
from titans.ops.memory.native import around
from titans.ops.memory.scan import check_range
from titans.ops.memory.state import OpenChunk, check_made_alike, rule_name
from titans.ops.rows import Packing, Rows
from titans.state import State, check_place, counts


@dataclass(frozen=True)
class NeuralMemoryState(State):
    """The memory, and the last inputs of the convolution [B, K-1, 3·H·D] (None without one)."""

    memory: MemoryState
    tail: Tensor | None

    @property
    def seen(self) -> tuple[int, ...]:
        """Tokens read, per row."""
        return self.memory.count


class NeuralMemory(Module):
    """A small network per sample and head whose weights learn, by gradient descent, what it reads.

    Each token is projected to a query, a key and a value (causal convolution, ℓ2-normalised q and k, v no longer than
    √D under the wrapper x + LN(.)) and to its own step size θ, momentum decay η and forgetting α. The memory takes a
    gradient step on ℓ(M(k), v) and is then read at q; the read is normalised, gated and projected.

    Args:
        d_model: width of x.
        n_layers: depth of the memory network; 1 is the matrix memory. Default: as ``miras`` says.
        n_heads: memory heads; default: the largest that leaves heads at least 64 wide.
        chunk_size: C; gradients are taken at the weights of the chunk's start. Gates act per token for every C.
        head_dim: D, the width of a head's keys and values, and with it how much it holds; default d_model / H.
        d_hidden: total hidden width of the memory networks, split over the heads; default 4·H·D.
        use_momentum: carry past surprise along (Titans Eq. 10). Default: as ``miras`` says.
        use_decay: forgetting gate α (Titans Eq. 13); default True.
        miras: the four choices; default ``MirasConfig.steady()``.
        conv_kernel: kernel of the convolution after each projection; 0 for none.
        qkv_activation: "none" or "silu" after the convolution.
        theta_max: cap of θ / (1 - η), so that momentum makes no step longer; of θ without momentum and with muon.
            Default ``miras.step_scale`` / D · min(1, 16 / C), so 1/D for the Titans rule at C ≤ 16: gradients of one
            chunk are all taken at the same weights, and add up where its tokens are alike.

        engine: how the memory is computed, see `titans.ops.memory_scan`; an attribute that can be set later.

    Raises:
        ValueError: a width that does not divide, or a shorthand that contradicts ``miras``.

    Source: Titans §3.1-3.2 and §4.4.
    """

    # A_0 sets the scale at which the memory works for a whole stream, gains and biases are those of a norm.
    undecayed = ("initial_weights", "log_steps", "norm_gain", "norm_bias")

    def __init__(
        self,
        d_model: int,
        n_layers: int | None = None,
        n_heads: int | None = None,
        chunk_size: int = 64,
        *,
        head_dim: int | None = None,
        d_hidden: int | None = None,
        use_momentum: bool | None = None,
        use_decay: bool | None = None,
        miras: MirasConfig | None = None,
        conv_kernel: int = 4,
        qkv_activation: Literal["none", "silu"] = "none",
        theta_max: float | None = None,
        engine: Engine = "auto",
    ):
        super().__init__()
        for name, value, least in (
            ("d_model", d_model, 1),
            ("chunk_size", chunk_size, 1),
            ("conv_kernel", conv_kernel, 0),
        ):
            check_count(name, value, least)
        n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_count("n_heads", n_heads, 1)
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model = {d_model}, got {n_heads}")
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        check_count("head_dim", self.head_dim, 1)
        width = n_heads * self.head_dim
        if theta_max is not None and not (isinstance(theta_max, int | float) and 0 < theta_max < math.inf):
            raise ValueError(f"theta_max must be positive and finite, got {theta_max!r}")
        if qkv_activation not in ("none", "silu"):
            raise ValueError(f"qkv_activation must be 'none' or 'silu', got {qkv_activation!r}")
        self.d_model, self.n_heads, self.chunk_size = d_model, n_heads, chunk_size
        self.miras = resolve_miras(miras, n_layers, d_hidden, use_momentum, width, n_heads)
        self.rule_name = rule_name(self.miras)
        self.use_decay = use_decay is not False
        check_engine(engine)
        self.engine: Engine = engine
        self.qkv_activation = qkv_activation
        self.theta_max = default_theta_max(self.miras, self.head_dim, chunk_size) if theta_max is None else theta_max

        self.qkv = Linear(d_model, 3 * width)
        self.conv = ShortConvolution(3 * width, conv_kernel) if conv_kernel else None
        self.gates = MemoryGates(d_model, n_heads, self.head_dim, self.miras, self.use_decay, self.theta_max)
        shapes = [(n_heads, *shape) for shape in self.miras.architecture.shapes(self.head_dim)]
        self.initial_weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        per_chunk, normed = self.miras.algorithm.per_chunk, self.miras.architecture.residual_norm
        self.log_steps = nn.ParameterList(nn.Parameter(torch.empty(n_heads)) for _ in shapes) if per_chunk else None
        self.norm_gain = nn.Parameter(torch.empty(n_heads, self.head_dim)) if normed else None
        self.norm_bias = nn.Parameter(torch.empty(n_heads, self.head_dim)) if normed else None
        self.read_norm = RMSNorm(width)
        self.read_gate = Linear(d_model, width)
        self.out = Linear(width, d_model)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        for parameter, start in zip(
            self.initial_weights, self.miras.architecture.initial(self.head_dim, self.n_heads), strict=True
        ):
            parameter.copy_(self.miras.retention.initial(start))
        if self.log_steps is not None:
            for parameter, step in zip(self.log_steps, default_steps(tuple(self.initial_weights)), strict=True):
                parameter.copy_(step.log())
        if self.norm_gain is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_gain)
            nn.init.zeros_(self.norm_bias)
        queries, keys, _ = self.qkv.weight.chunk(3)
        start_keys_one_token_behind(queries, keys, self.conv)

    @overload
    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = ...,
        return_state: Literal[False] = ...,
        mask: Tensor | None = ...,
        store_mask: Tensor | None = ...,
        rows: Rows | None = ...,
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
        rows: Rows | None = ...,
    ) -> tuple[Tensor, NeuralMemoryState]: ...

    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
        store_mask: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor | tuple[Tensor, NeuralMemoryState]:
        """Write and read every token.

        Args:
            x: [B, T, d_model], T ≥ 1.
            state: where an earlier call stopped; None starts a new stream.
            return_state: also return the state after the last token.
            mask: [B, T] bool, False for padding: it does nothing and its output is zero.
            store_mask: [B, T] bool, False for tokens that are read but not written.
            rows: instead of ``mask``, from a caller that has already right-padded the batch and checked its arguments.

        Returns:
            y [B, T, d_model], and the state if asked for.

        Raises:
            ValueError: an argument does not fit, named.
            FloatingPointError: reading without gradients, the memory diverged.
        """
        packing, checked = None, rows is not None
        if rows is None:
            self._check(x, state, mask=mask, store_mask=store_mask)
            rows = self._rows(x, state)
            if mask is not None and not bool(mask.all()):
                packing = Packing.of(mask)
                rows = Rows(rows.seen, packing.counts, rows.tokens)
                x, store_mask = packing.pack(x), None if store_mask is None else packing.pack(store_mask)
        tokens, tail = self._tokens(x, state, rows)
        memory = None if state is None else state.memory
        engine = engine_for(self.engine, self.miras, x.device)
        found, memory, _ = scan(self.rule, stored(tokens, store_mask), memory, rows, engine)
        if not checked:
            memory = replace(memory, rule=self.rule_name)
        y, state = self.output(found, x), NeuralMemoryState(memory, tail)
        if not checked:
            check_finite([state], ["this layer"])
        if packing is not None:
            y = packing.unpack(y)
        return (y, state) if return_state else y

    def retrieve(self, x: Tensor, state: NeuralMemoryState | None = None) -> Tensor:
        """Read x [B, T, d_model] from the memory as the state left it; nothing is written.

        The convolution takes x for the continuation of the stream.
        """
        self._check(x, state)
        q, _, _, _ = self._project(x, state, self._rows(x, state))
        return self.output(read(self.rule, q, None if state is None else state.memory), x)

    def trace(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        store_mask: Tensor | None = None,
        rows: Rows | None = None,
    ) -> MemoryTrace:
        """Per-token surprise ‖g_t‖, inner loss, θ, η, α, each [B, T, H], while reading x from ``state`` on.

        Arguments as in a call.
        """
        if rows is None:
            self._check(x, state, store_mask=store_mask)
            rows = self._rows(x, state)
        tokens, _ = self._tokens(x, state, rows)
        return memory_trace(self.rule, stored(tokens, store_mask), None if state is None else state.memory, rows)

    def recall(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Read from weights at a chunk's start, neither gated nor projected.

        Args:
            x: queries [B, n, H, D] as `normalise` returns them.
            weights: accumulated weights A per map, [B, H, out, in].

        Returns:
            [B, n, H·D].
        """
        return read_weights(self.rule, x, weights).flatten(2)

    def start(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A_0 for every row of a batch, [B, H, out, in] per map."""
        return initial_weights(self.rule, batch, dtype)

    def begin(self, x: Tensor) -> NeuralMemoryState:
        """The state of fresh rows, with A_0 in it; x [B, ...] tells batch and dtype."""
        gates = self.gates(x.new_zeros(x.shape[0], 0, self.d_model))[0].each(lambda g: g.transpose(1, 2)).storable()
        weights = self.start(x.shape[0], x.dtype)
        momentum = tuple(map(torch.zeros_like, weights)) if self.miras.algorithm.momentum else ()
        inputs = tuple(w.new_zeros(*w.shape[:2], 0, w.shape[-1]) for w in weights)
        errors = tuple(w.new_zeros(*w.shape[:2], 0, w.shape[2]) for w in weights)
        read = counts([0] * x.shape[0])
        memory = MemoryState(weights, momentum, OpenChunk(inputs, errors, gates), read, self.chunk_size)
        return NeuralMemoryState(memory, None if self.conv is None else self.conv.start(x, None, (0,) * x.shape[0]))

    @property
    def rule(self) -> Rule:
        """The memory's rule, bound to this layer's parameters."""
        norm = None if self.norm_gain is None or self.norm_bias is None else (self.norm_gain, self.norm_bias)
        steps = None
        if self.log_steps is not None:
            # θ / θ_max is what scales a step here (math.md §4).
            steps = tuple(s.exp() / self.theta_max for s in self.log_steps)
        return Rule(self.miras, tuple(self.initial_weights), self.chunk_size, norm, steps)

    def output(self, found: Tensor, x: Tensor) -> Tensor:
        """Normalise, gate by x and project a read [B, T, H, D] -> [B, T, d_model]."""
        gate = self.read_gate(x)
        norm = self.read_norm
        if self.compiles and plain(gate, norm) and around.usable(found, gate):
            return self.out(around.gated_norm(found, norm.weight, norm.eps_of(found), gate))
        return self.out(norm(found.flatten(2)) * torch.sigmoid(gate))

    def _tokens(self, x: Tensor, state: NeuralMemoryState | None, rows: Rows) -> tuple[Tokens, Tensor | None]:
        """What the memory reads, and the convolution's new tail."""
        q, k, v, tail = self._project(x, state, rows)
        gates, delta = self.gates(x)
        return Tokens(q, k, v, gates, delta), tail

    def _project(
        self, x: Tensor, state: NeuralMemoryState | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        projected, tail = self.qkv(x), None
        if self.conv is not None:
            before = None if state is None else state.tail
            if self.compiles:
                cut = around.LIMIT if self.miras.architecture.residual_norm else around.PLAIN
                kinds = around.UNIT, around.UNIT, cut
                found = self.conv.heads(projected, before, rows, kinds, self.head_dim, self.head_dim**0.5)
                if found is not None:
                    return found  # type: ignore[return-value]
            projected, tail = self.conv(projected, before, rows)
        return *self.heads(projected), tail

    @property
    def compiles(self) -> bool:
        """May what lies around the scan run in C++ too? Another engine, named, has all of it in torch operations."""
        return self.engine in ("auto", "native") and self.qkv_activation == "none"

    def heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected and convolved tokens [B, T, 3·H·D] -> q, k and v, each [B, T, H, D]."""
        q, k, v = projected.chunk(3, -1)
        if self.qkv_activation == "silu":
            v = F.silu(v)
        return self.normalise(q), self.normalise(k), self._limit(v.unflatten(-1, (self.n_heads, self.head_dim)))

    def normalise(self, x: Tensor) -> Tensor:
        """Projected queries, keys or both [B, T, n·H·D] -> unit vectors per head [B, T, n·H, D]."""
        if self.qkv_activation == "silu":
            x = F.silu(x)
        return F.normalize(x.unflatten(-1, (-1, self.head_dim)), dim=-1, eps=1e-12)

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

    def _rows(self, x: Tensor, state: NeuralMemoryState | None) -> Rows:
        return Rows.whole((0,) * x.shape[0] if state is None else state.seen, x.shape[1])

    def _check(self, x: Tensor, state: NeuralMemoryState | None, **masks: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[-1] != self.d_model or 0 in x.shape:
            raise ValueError(f"x must be a non-empty [B, T, {self.d_model}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        check_dtype("x", x, self.qkv.weight.dtype)
        for name, flags in masks.items():
            if flags is not None and not isinstance(flags, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(flags).__name__}")
            if flags is not None and (flags.dtype != torch.bool or flags.shape != x.shape[:2]):
                raise ValueError(
                    f"{name} must be bool [B, T] = {list(x.shape[:2])}, got {flags.dtype} {list(flags.shape)}"
                )
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look means to wait
            mask = masks.get("mask")
            check_range("x", x if mask is None else x[mask])
        if state is not None and not isinstance(state, NeuralMemoryState):
            raise ValueError(f"state must be a NeuralMemoryState, got {type(state).__name__}")
        if state is not None and state.rows != x.shape[0]:
            raise ValueError(f"state has {state.rows} rows, x has {x.shape[0]}")
        if state is not None:
            self.check_state(state)
            if not torch.compiler.is_compiling():
                check_place(state, x.device, "x")

    def check_state(self, state: NeuralMemoryState) -> None:
        """Raise a ValueError that names the first part of ``state`` which is not of this layer's shape."""
        memory, rows = state.memory, state.rows
        check_made_alike(memory, self.chunk_size, self.rule_name)
        wanted = [[rows, *w.shape] for w in self.initial_weights]
        maps = (("weights", memory.weights, wanted), ("momentum", memory.momentum, wanted if memory.momentum else []))
        for name, tensors, shapes in maps:
            if (found := [list(w.shape) for w in tensors]) != shapes:
                raise ValueError(f"state.memory.{name} has shapes {found}, this memory and batch need {shapes}")
        if bool(memory.momentum) != self.miras.algorithm.momentum:
            raise ValueError(f"state.memory.momentum must {'not ' * (not self.miras.algorithm.momentum)}be there")
        tail = None if self.conv is None else [rows, self.conv.kernel - 1, self.qkv.weight.shape[0]]
        if (None if state.tail is None else list(state.tail.shape)) != tail:
            raise ValueError(f"state.tail must be {tail}, got {None if state.tail is None else list(state.tail.shape)}")
