"""Associative recall of vectors: the memory rule alone, without a language model around it.

A stream shows pairs (k_t, v_t) one after the other. After every write the memory is asked for the value of a key that
it has seen; the answer counts if the right value is the nearest of all candidates. The slow parameters (A_0, gates
as constants, the norm) are learned on short streams; all else about a task is how it draws its streams.

Legend: B streams, T tokens, D width, N candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.miras import MirasConfig
from titans.ops.memory import default_steps, memory_scan


@dataclass(frozen=True)
class Streams:
    """Keys and queries [B, T, D] of unit length, values shown [B, T, D], candidates [B, N, D], answers [B, T]."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    candidates: Tensor
    answers: Tensor


Draw = Callable[[torch.Generator], Streams]


class VectorMemory(nn.Module):
    """One head of a memory under ``rule`` with constant, learned gates.

    Args:
        rule: the four choices; gates per head.
        width: D.
        chunk_size: C.
        use_decay: is there a forgetting gate?
    """

    def __init__(self, rule: MirasConfig, width: int, chunk_size: int = 16, use_decay: bool = True):
        super().__init__()
        self.rule, self.chunk_size = rule, chunk_size
        shapes = rule.architecture.shapes(width)
        plain = [torch.randn(1, *shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes]
        self.weights = nn.ParameterList(rule.retention.initial(w) for w in plain)
        self.log_theta = nn.Parameter(torch.tensor(0.5 / width).log())
        self.eta = nn.Parameter(torch.tensor(0.0)) if rule.algorithm.momentum else None
        self.alpha = nn.Parameter(torch.tensor(-4.0)) if use_decay else None
        self.log_delta = nn.Parameter(torch.tensor(0.0)) if rule.bias.learned_delta else None
        self.log_steps = None
        if rule.algorithm.per_chunk:
            self.log_steps = nn.ParameterList(s.log() for s in default_steps(tuple(self.weights)))
        self.norm = None
        if rule.architecture.residual_norm:
            self.norm = nn.ParameterList([torch.ones(1, width), torch.zeros(1, width)])
        self.log_temperature = nn.Parameter(torch.tensor(0.0))

    def forward(self, streams: Streams) -> Tensor:
        """Log-odds of the candidates after every token, [B, T, N]."""
        batch, tokens, width = streams.keys.shape

        def gate(value: Tensor) -> Tensor:
            return value.expand(batch, tokens, 1)

        q, k, v = (x.unsqueeze(2) for x in (streams.queries, streams.keys, streams.values))
        found, _ = memory_scan(
            q, k, v, gate(self.log_theta.exp()),
            None if self.eta is None else gate(self.eta.sigmoid()),
            None if self.alpha is None else gate(self.alpha.sigmoid()),
            weights=tuple(self.weights), miras=self.rule, chunk_size=self.chunk_size,
            norm=None if self.norm is None else (self.norm[0], self.norm[1]),
            delta=None if self.log_delta is None else gate(self.log_delta.exp()),
            steps=None if self.log_steps is None else tuple(s.exp() for s in self.log_steps),
        )  # fmt: skip
        distance = (found - streams.candidates.unsqueeze(1)).square().mean(-1) if found.shape[2] == 1 else None
        assert distance is not None  # one head, which broadcasts against the candidates
        return -distance * self.log_temperature.exp() * width**0.5


def train(memory: VectorMemory, draw: Draw, steps: int, seed: int, lr: float = 0.01) -> list[float]:
    """Learn the slow parameters on fresh streams; returns the losses.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(memory.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
    )
    losses = []
    for step in range(steps):
        streams = draw(random)
        loss = F.cross_entropy(memory(streams).flatten(0, 1), streams.answers.flatten(), ignore_index=-100)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(memory: VectorMemory, draw: Draw, seed: int, batches: int = 4) -> Tensor:
    """Share of right answers after every token, [T]; NaN where nothing was asked."""
    random = torch.Generator().manual_seed(seed)
    right = asked = torch.zeros(())
    for _ in range(batches):
        streams = draw(random)
        known = streams.answers != -100
        right = right + ((memory(streams).argmax(-1) == streams.answers) & known).sum(0)
        asked = asked + known.sum(0)
    return right / asked


def pairs(
    random: torch.Generator, batch: int, tokens: int, count: int, width: int, *, outliers: float = 0.0,
    noise: float = 0.0, similarity: float = 0.0, shift: int | None = None,
) -> Streams:  # fmt: skip
    """Streams over ``count`` pairs shown in random order, each asked for at random after it was shown.

    Args:
        random: where everything is drawn from.
        batch, tokens, width: B, T, D.
        count: pairs that a stream can show at a time, N of the candidates.
        outliers: share of shown values that are replaced by noise ten times their size.
        noise: standard deviation of noise on the keys shown, relative to their length.
        similarity: cosine between the keys, the same for any two; 0 for independent keys.
        shift: after so many tokens all pairs are replaced by new ones; None: never.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    phases = 1 if shift is None else -(-tokens // shift)
    common = normal(batch, phases, 1, width) * similarity**0.5
    keys = F.normalize(common + normal(batch, phases, count, width) * (1 - similarity) ** 0.5, dim=-1)
    values = normal(batch, phases, count, width)
    shown = torch.randint(count, (batch, tokens), generator=random)
    phase = torch.arange(tokens) // (shift or tokens)
    rows = torch.arange(batch).unsqueeze(1)
    seen_keys, seen_values = keys[rows, phase, shown], values[rows, phase, shown]
    if noise:
        seen_keys = F.normalize(seen_keys + normal(*seen_keys.shape) * noise / width**0.5, dim=-1)
    if outliers:
        hit = torch.rand(batch, tokens, 1, generator=random) < outliers
        seen_values = torch.where(hit, 10 * normal(*seen_values.shape), seen_values)
    asked = _asked(random, shown, phase)
    answers = torch.where(asked >= 0, phase * count + asked, -100)
    return Streams(seen_keys, seen_values, keys[rows, phase, asked.clamp(min=0)], values.flatten(1, 2), answers)


def _asked(random: torch.Generator, shown: Tensor, phase: Tensor) -> Tensor:
    """A pair shown earlier in the same phase, at random, [B, T]."""
    batch, tokens = shown.shape
    first = torch.searchsorted(phase, phase)  # first token of the phase
    back = torch.rand(batch, tokens, generator=random) * (torch.arange(tokens) - first + 1)
    return shown.gather(1, torch.arange(tokens) - back.long())
