"""Associative recall of vectors: the memory rule alone, without a language model around it.

A stream shows pairs (k_t, v_t) one after the other. After every write the memory is asked for the value of a key that
it has seen; the answer counts if the right value is the nearest of all candidates. The slow parameters (A_0, gates
as constants, the norm) are learned on short streams; all else about a task is how it draws its streams.

Legend: B streams, T tokens, D width, N candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from experiments.framework import Figures, Workplace
from titans.miras import MLP, MirasConfig
from titans.ops.memory import default_steps, memory_scan


@dataclass(frozen=True)
class Streams:
    """Keys and queries [B, T, D] of unit length, values shown [B, T, D]; P phases of T / P tokens with candidates
    [B, P, N, D] of their own; answers [B, T], numbers of a candidate of the token's phase."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    candidates: Tensor
    answers: Tensor


# Fields of a task at each scale, and the memory network of its rules.
STUDY: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 300, "batch": 16, "network": MLP(expansion=2)},
    "small": {"steps": 1000, "network": MLP(expansion=2)},
    "medium": {"steps": 2000, "width": 64, "count": 64, "tokens": 512, "network": MLP(expansion=4)},
    "large": {"steps": 5000, "width": 128, "count": 256, "tokens": 2048, "network": MLP(expansion=4)},
}


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
        self.weights = nn.ParameterList(rule.retention.initial(w) for w in rule.architecture.initial(width, 1))
        self.log_theta = nn.Parameter(torch.tensor(0.5 * rule.step_scale / width).log())
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
        # The nearest candidate: ‖f‖² is common to all.
        reads = found.squeeze(2).unflatten(1, (streams.candidates.shape[1], -1))
        closeness = 2 * reads @ streams.candidates.mT - streams.candidates.square().sum(-1).unsqueeze(2)
        return closeness.flatten(1, 2) * self.log_temperature.exp() / width**0.5


Condition = dict[str, Any]  # arguments of `pairs`


class VectorTask(BaseModel):
    """One rule on this task.

    Attributes:
        rule: the four choices.
        use_decay: with a forgetting gate?
        width, count: D, and pairs that a stream holds at a time.
        chunk_size: C.
        batch, tokens, steps, lr: of training; T is the length of its streams.
        trained_on: conditions of ``pairs`` that training draws from, batch by batch.
        tested_on: conditions by the word that the figure carries.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: MirasConfig
    use_decay: bool = True
    width: int = 32
    count: int = 16
    chunk_size: int = 16
    batch: int = 32
    tokens: int = 128
    steps: int = 250
    lr: float = 0.01
    trained_on: tuple[Condition, ...]
    tested_on: dict[str, Condition]


def by_rule(rules: Mapping[str, MirasConfig], scale: str, conditions: dict[str, Condition]) -> dict[str, VectorTask]:
    """One arm per rule, at the scale's size and with its network, trained and tested on the same conditions."""
    size = {**STUDY[scale], "trained_on": tuple(conditions.values()), "tested_on": conditions}
    network = size.pop("network")
    return {
        name: VectorTask(rule=rule.model_copy(update={"architecture": network}), **size) for name, rule in rules.items()
    }


def learn(task: VectorTask, seed: int, say: Callable[[str], None]) -> VectorMemory:
    """Train a memory's slow parameters on fresh streams.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    torch.manual_seed(seed)
    memory = VectorMemory(task.rule, task.width, task.chunk_size, task.use_decay)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(memory.parameters(), lr=task.lr, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 20, 2 * (1 - step / task.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(task.steps):
        condition = task.trained_on[int(torch.randint(len(task.trained_on), (1,), generator=random))]
        streams = pairs(random, task.batch, task.tokens, task.count, task.width, **condition)
        loss = F.cross_entropy(memory(streams).flatten(0, 1), streams.answers.flatten())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            say(f"  step {step + 1}/{task.steps}  loss {loss.item():.3f}")
    return memory


@torch.no_grad()
def accuracy(memory: VectorMemory, task: VectorTask, tokens: int, batches: int, **condition: Any) -> Tensor:
    """Share of right answers after every token, [T], on streams that no training sees."""
    random = torch.Generator().manual_seed(10_000)
    right = torch.zeros(tokens)
    for _ in range(batches):
        streams = pairs(random, task.batch, tokens, task.count, task.width, **condition)
        right += (memory(streams).argmax(-1) == streams.answers).float().mean(0)
    return right / batches


def recall_unit(task: VectorTask, seed: int, place: Workplace) -> Figures:
    """Accuracy in the second half of a stream of the training length, under every condition tested."""
    memory = learn(task, seed, place.say)
    half = task.tokens // 2
    return {
        f"accuracy@{word}": accuracy(memory, task, task.tokens, 8, **condition)[half:].mean().item()
        for word, condition in task.tested_on.items()
    }


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
        shift: after so many tokens, a divisor of T, all pairs are replaced by new ones; None: never.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    phases = 1 if shift is None else tokens // shift
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
    # A pair shown earlier in the same phase, at random: the token itself, or one before it.
    back = (torch.rand(batch, tokens, generator=random) * (torch.arange(tokens) % (shift or tokens) + 1)).long()
    asked = shown.gather(1, torch.arange(tokens) - back)
    return Streams(seen_keys, seen_values, keys[rows, phase, asked], values, asked)
