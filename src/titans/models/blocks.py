"""The blocks: four ways to put a memory beside attention (Titans §4), and the baselines' mixers.

Every mixer maps normalised x [B, T, d_model] of a right-padded batch, with the state of its streams, to its output and
the new state. Legend: B batch, T tokens, P persistent tokens, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.attention import Attention, AttentionCache
from titans.layers.feedforward import FeedForward
from titans.memory import NeuralMemoryState
from titans.models.branch import PrefixedMemory
from titans.models.config import TitansConfig
from titans.models.mac import MACMixer
from titans.ops.memory import State
from titans.ops.place import Place


class LMMMixer(nn.Module):
    """The memory alone (Titans §4.3)."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, place: Place, store: Tensor | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        y, after, _ = self.branch(x, state, place, store)
        return y, after


@dataclass(frozen=True)
class MAGState(State):
    """Memory and attention cache of one layer."""

    memory: NeuralMemoryState
    cache: AttentionCache


class MAGMixer(nn.Module):
    """Memory as a gate: o = n1(SWA([P‖x])) ⊗ σ(n2(M([P‖x]))) (Titans Eqs. 26-28).

    The paper leaves σ open. SiLU it is: a sigmoid lets the memory only damp what attention found, and costs 0.075
    bits per byte (docs/results/lasting.md).
    """

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.attention = Attention(config.d_model, config.attention_heads, config.window, config.rope_base)
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.memory_norm = nn.RMSNorm(config.d_model)

    def forward(self, x: Tensor, state: MAGState | None, place: Place, store: Tensor | None) -> tuple[Tensor, MAGState]:
        read, memory, _ = self.branch(x, None if state is None else state.memory, place, store)
        always = self.branch.persistent.P.unsqueeze(0) if self.branch.persistent else None
        y, cache = self.attention(x, None if state is None else state.cache, place, always)
        return self.attention_norm(y) * F.silu(self.memory_norm(read)), MAGState(memory, cache)


@dataclass(frozen=True)
class MALState(State):
    """Memory, attention cache and the memory's outputs at the persistent tokens [B, P, d_model]."""

    memory: NeuralMemoryState
    cache: AttentionCache
    persistent: Tensor | None


class MALMixer(nn.Module):
    """Memory as a layer: y = M([P‖x]), then sliding-window attention over y (Titans Eqs. 29-31)."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config.d_model, config.attention_heads, config.window, config.rope_base)

    def forward(self, x: Tensor, state: MALState | None, place: Place, store: Tensor | None) -> tuple[Tensor, MALState]:
        y, memory, first = self.branch(x, None if state is None else state.memory, place, store)
        persistent = self._persistent(first, state, place, y)
        cache = None if state is None else state.cache
        out, cache = self.attention(self.norm(y), cache, place, persistent)
        return out, MALState(memory, cache, persistent)

    def _persistent(self, first: Tensor | None, state: MALState | None, place: Place, y: Tensor) -> Tensor | None:
        """The memory's outputs at the persistent tokens: new for rows that start, the state's for the others."""
        if self.branch.persistent is None:
            return None
        if state is None or state.persistent is None:
            known = y.new_zeros(y.shape[0], self.branch.persistent.n_tokens, y.shape[2])
        else:
            known = state.persistent.to(y.dtype)  # the state may come from a call under autocast
        if first is None:
            return known
        starting = torch.tensor(place.starting, device=y.device).view(-1, 1, 1)
        return torch.where(starting, self.norm(first).to(y.dtype), known)


class AttentionMixer(nn.Module):
    """The baselines: full causal attention, or a sliding window."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        window = config.window if config.variant == "swa" else None
        self.attention = Attention(config.d_model, config.attention_heads, window, config.rope_base)

    def forward(
        self, x: Tensor, state: AttentionCache | None, place: Place, store: Tensor | None
    ) -> tuple[Tensor, AttentionCache]:
        return self.attention(x, state, place)


MIXERS: dict[str, type[nn.Module]] = {
    "LMM": LMMMixer,
    "MAC": MACMixer,
    "MAG": MAGMixer,
    "MAL": MALMixer,
    "transformer": AttentionMixer,
    "swa": AttentionMixer,
}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model)
        self.mixer = MIXERS[config.variant](config)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn = FeedForward(config.d_model, config.ffn_mult)

    def forward(self, x: Tensor, state: State | None, place: Place, store: Tensor | None) -> tuple[Tensor, State]:
        mixed, after = self.mixer(self.mixer_norm(x), state, place, store)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), after
