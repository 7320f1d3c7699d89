"""Where a call stands in its streams: what every layer needs to know about rows, worked out once per call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Tokens seen before this call, per row, and the real tokens of this call.

    Attributes:
        seen: tokens before this call, per row; 0 marks a fresh stream.
        tokens: T, columns of this call.
        lengths: real tokens per row of a right-padded batch; None: every row has T.
    """

    seen: tuple[int, ...]
    tokens: int
    lengths: tuple[int, ...] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Real tokens of this call, per row."""
        return self.lengths if self.lengths is not None else (self.tokens,) * len(self.seen)

    @property
    def after(self) -> tuple[int, ...]:
        """Tokens seen once this call is done, per row."""
        return tuple(s + n for s, n in zip(self.seen, self.counts, strict=True))

    @property
    def starting(self) -> tuple[bool, ...]:
        """Rows whose stream begins in this call."""
        return tuple(s == 0 and n > 0 for s, n in zip(self.seen, self.counts, strict=True))

    def positions(self, device: torch.device, modulo: int | None = None) -> Tensor:
        """Stream position of every column, [T] when all rows agree, else [B, T]; ``modulo`` counts within segments."""
        columns = torch.arange(self.tokens, device=device)
        if len(set(self.seen)) == 1:
            positions = self.seen[0] + columns
        else:
            positions = torch.tensor(self.seen, device=device).unsqueeze(1) + columns
        return positions if modulo is None else positions % modulo
