"""Gates per output channel (MIRAS §5.3): the dual form when every output channel of a map decays by itself.

K then differs from channel to channel, so that one masked product no longer serves a whole map. A chunk is read in
short blocks: inside a block K is held for every channel, from block to block the weights are carried along. Nothing is
divided and no logarithm is taken, so gates of 0 and 1 are exact here too.

Legend: G rows (batch times heads), n tokens of the chunk so far, m of them queries, c tokens of a block, in/out widths
of one map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans.autograd import hand_written
from titans.ops.memory.decay import ChunkEnd, cumulative_products
from titans.ops.memory.maps import map_kind, retain
from titans.ops.memory.tokens import Gates
from titans.ops.scan import parallel_scan

BLOCK = 16


@dataclass(frozen=True)
class ChannelDecay:
    """The gates of one map along the chunk so far; the last ``queries`` tokens are readers, all are writers.

    Attributes:
        theta: [G, n, out].
        keep: 1 - α, [G, n, out]; None without forgetting.
        eta, write: [G, n]; None without momentum, and where every token writes.
    """

    theta: Tensor
    keep: Tensor | None
    eta: Tensor | None
    write: Tensor | None
    queries: int

    def cut(self, start: int, stop: int) -> ChannelDecay:
        """The part of the tokens from ``start`` to ``stop``, all of them readers."""
        theta, keep, eta, write = (
            None if g is None else g[:, start:stop] for g in (self.theta, self.keep, self.eta, self.write)
        )
        assert theta is not None
        return ChannelDecay(theta, keep, eta, write, stop - start)

    @property
    def retained(self) -> Tensor | None:
        """P_t of the queries, [G, m, out]."""
        return None if self.keep is None else self.keep.cumprod(1)[:, -self.queries :]

    def read(self, x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, fades: bool) -> Tensor:
        if fades:
            return _read(x, weight, momentum, a, error, self)
        writes = _read(x, torch.zeros_like(weight), momentum, a, error, self)
        return map_kind(weight).apply(weight, x) + writes

    def ending(self) -> ChunkEnd:
        """What remains of the start and of every write when the tokens so far end."""
        later = None if self.keep is None else _products_after(self.keep)
        retained = None if self.keep is None or later is None else later[:, 0] * self.keep[:, 0]
        steps = self.theta.sum(1)
        if self.eta is None:
            return ChunkEnd(self.theta if later is None else later * self.theta, retained, None, None, None, steps)
        written = torch.ones_like(self.theta) if later is None else later
        if self.write is not None:
            written = written * self.write.unsqueeze(-1)
        momentum = cumulative_products(self.eta)
        decayed = momentum[..., 0] * self.eta[:, :1]
        return ChunkEnd(
            share=torch.bmm(momentum.mT, written) * self.theta,
            retained=retained,
            pushed=torch.bmm(decayed.unsqueeze(1), written).squeeze(1),
            carried=decayed[:, -1:],
            momentum_share=momentum[:, -1].unsqueeze(-1) * self.theta,
            steps=steps,
        )

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """K[t, i] [G, n, n, out] and m_t [G, n, out] of a block."""
        size, out = self.theta.shape[1:]
        if self.eta is None:
            eye = torch.eye(size, dtype=self.theta.dtype, device=self.theta.device)
            sources = eye.expand(self.theta.shape[0], -1, -1)
        else:
            # One more column: S_0, whose share of a write has decayed since the start.
            sources = cumulative_products(self.eta)
            sources = torch.cat((sources, sources[..., :1] * self.eta[:, :1].unsqueeze(-1)), -1)
            if self.write is not None:
                sources = sources * self.write.unsqueeze(-1)
        if self.keep is None:
            rows = sources.cumsum(1).unsqueeze(-1).expand(-1, -1, -1, out)
        else:
            rows: Tensor = _Recurrence.apply(self.keep, sources)  # type: ignore[assignment]
        return (rows, None) if self.eta is None else (rows[:, :, :size], rows[:, :, size])


class _Recurrence(torch.autograd.Function):
    """X_t = keep_t ⊙ X_{t-1} + sources_t from X = 0 on: keep [G, n, out], sources [G, n, k] -> [G, n, k, out].

    Written into place token by token; autograd would copy the whole block for every token.
    """

    @staticmethod
    def forward(ctx: Any, keep: Tensor, sources: Tensor) -> Tensor:  # type: ignore[override]
        rows = keep.new_empty(*sources.shape, keep.shape[-1])
        rows[:, 0] = sources[:, 0].unsqueeze(-1)
        for t in range(1, sources.shape[1]):
            torch.mul(rows[:, t - 1], keep[:, t].unsqueeze(1), out=rows[:, t])
            rows[:, t] += sources[:, t].unsqueeze(-1)
        ctx.save_for_backward(keep, rows)
        return rows

    @staticmethod
    @hand_written
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        keep, rows = ctx.saved_tensors
        of_keep = torch.zeros_like(keep)
        of_sources = grad.new_empty(grad.shape[:3])
        running = grad[:, -1]
        for t in range(grad.shape[1] - 1, -1, -1):
            if ctx.needs_input_grad[1]:
                of_sources[:, t] = running.sum(-1)
            if t:
                torch.sum(running * rows[:, t - 1], 1, out=of_keep[:, t])
                running = torch.addcmul(grad[:, t - 1], running, keep[:, t].unsqueeze(1))
        return of_keep, of_sources if ctx.needs_input_grad[1] else None


@dataclass(frozen=True)
class ChannelDecays:
    """The gates of every map; the same face as ``Decay``."""

    maps: tuple[ChannelDecay, ...]

    @classmethod
    def of(cls, gates: Gates) -> ChannelDecays:
        """From the gates of a chunk's tokens so far, in the engines' layout."""
        assert isinstance(gates.theta, tuple)
        alphas = gates.alpha if isinstance(gates.alpha, tuple) else (None,) * len(gates.theta)
        return cls(
            tuple(
                ChannelDecay(theta, None if alpha is None else 1 - alpha, gates.eta, gates.write, theta.shape[1])
                for theta, alpha in zip(gates.theta, alphas, strict=True)
            )
        )

    def of_map(self, index: int) -> ChannelDecay:
        return self.maps[index]

    def last(self, queries: int) -> ChannelDecays:
        return ChannelDecays(tuple(replace(m, queries=queries) for m in self.maps))


def _read(x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, decay: ChannelDecay) -> Tensor:
    """W_t x_t for the queries x [G, m, in] of one map; a [G, n, in] and error [G, n, out] of all the chunk's tokens."""
    if weight.dim() == 2:
        return _read_diagonal(x, weight, momentum, a, error, decay)
    tokens, outputs = decay.theta.shape[1], []
    stored = tokens - decay.queries
    if stored:
        weight, momentum = _advance(decay.cut(0, stored), weight, momentum, a[:, :stored], error[:, :stored])
    for start in range(stored, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        block, inputs, errors = decay.cut(start, stop), a[:, start:stop], error[:, start:stop]
        outputs.append(_read_block(x[:, start - stored : stop - stored], weight, momentum, inputs, errors, block))
        if stop < tokens:
            weight, momentum = _advance(block, weight, momentum, inputs, errors)
    return torch.cat(outputs, 1)


def _advance(
    part: ChannelDecay, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(W, S) after a part of the chunk."""
    ending = part.ending()
    new = ending.weight(retain(ending.retained, weight), momentum, a, error)
    return new, None if momentum is None else ending.momentum(momentum, a, error)


def _read_block(
    x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, block: ChannelDecay
) -> Tensor:
    """``_read`` for tokens that all are queries."""
    kernel, pushed = block.kernel()
    out = torch.bmm(x, weight.mT)
    out = out if block.retained is None else out * block.retained
    if momentum is not None and pushed is not None:
        out = torch.addcmul(out, torch.bmm(x, momentum.mT), pushed)
    scores = torch.bmm(x, a.mT).flatten(0, 1).unsqueeze(1)
    writes = (kernel * (block.theta * error).unsqueeze(1)).flatten(0, 1)
    return out - torch.bmm(scores, writes).view_as(out)


def _read_diagonal(
    x: Tensor, weight: Tensor, momentum: Tensor | None, a: Tensor, error: Tensor, decay: ChannelDecay
) -> Tensor:
    """``_read`` for an elementwise map [G, width]: the recurrence of math.md §2 itself, as a scan."""
    pushes = -decay.theta * error * a
    if momentum is not None and decay.eta is not None:
        pushes = parallel_scan(decay.eta.unsqueeze(-1), pushes, momentum)
        pushes = pushes if decay.write is None else pushes * decay.write.unsqueeze(-1)
    keep = torch.ones_like(pushes[..., :1]) if decay.keep is None else decay.keep
    return parallel_scan(keep, pushes, weight)[:, -decay.queries :] * x


def _products_after(gates: Tensor) -> Tensor:
    """Π_{j>t} g_j, [G, n, out]."""
    return torch.cat((gates[:, 1:].flip(1).cumprod(1).flip(1), torch.ones_like(gates[:, :1])), 1)
