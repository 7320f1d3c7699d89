"""From tokens to gates: step size θ, momentum decay η, forgetting α, and a learned Huber threshold δ.

Legend: B batch, T tokens, H memory heads, D head width, out: outputs of one map of the memory network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.module import Linear, Module
from titans.miras import MirasConfig
from titans.ops.memory import Gates

INITIAL_DELTA = 1.0
RANK = 32
FULL_STEP_CHUNK = 16  # tokens; a default step size shrinks in longer chunks


def default_heads(d_model: int) -> int:
    """The largest divisor h of d_model that leaves heads at least 64 wide; 1 if there is none."""
    return max((h for h in range(1, d_model // 64 + 1) if d_model % h == 0), default=1)


def default_theta_max(miras: MirasConfig, head_dim: int, chunk_size: int) -> float:
    """``step_scale`` / D · min(1, 16 / C): gradients of one chunk are all taken at the same weights, and add up."""
    return miras.step_scale / head_dim * min(1, FULL_STEP_CHUNK / chunk_size)


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class MemoryGates(Module):
    """The gates of every token, by one linear map of it; with channel gates by one of rank 32.

    With momentum θ = ``theta_max`` · (1 - η) · σ(.), so that S_t is a weighted mean of the steps -theta_max σ g so far
    and what is written never exceeds theta_max times the largest gradient. Without momentum, and with one that is
    orthogonalised before it is added, θ = theta_max σ(.).

    They start at σ = 0.5, η = 0.5, α as the retention says and δ = 1, with a little noise from token to token.

    Args:
        d_model: width of x.
        heads, head_dim: H and D.
        miras: says which gates there are, and whether they are numbers of a head or of every output channel.
        use_decay: is there an α?
        theta_max: cap of θ / (1 - η); of θ without momentum and with muon.

    Source: Titans §3.1; MIRAS §5.3 for channels.
    """

    # They start near zero on purpose: decay would pull every token's gate back to the shared bias.
    undecayed = ("down", "up")

    def __init__(self, d_model: int, heads: int, head_dim: int, miras: MirasConfig, use_decay: bool, theta_max: float):
        super().__init__()
        self.heads, self.theta_max, self.per_channel = heads, theta_max, miras.gates == "channel"
        self.per_chunk = miras.algorithm.per_chunk
        widths = [shape[0] for shape in miras.architecture.shapes(head_dim)] if self.per_channel else [1]
        self.parts = [("theta", n) for n in widths]
        if miras.algorithm.momentum:
            self.parts.append(("eta", 1))
        if use_decay:
            self.parts += [("alpha", n) for n in widths]
        if miras.bias.learned_delta:
            self.parts.append(("delta", head_dim if self.per_channel else 1))
        self.sizes = [heads * n for _, n in self.parts]
        self.starts = {
            "alpha": _logit(miras.retention.initial_forgetting),
            "delta": math.log(math.expm1(INITIAL_DELTA)),
        }
        self.down = Linear(d_model, RANK) if self.per_channel else None
        self.up = Linear(RANK if self.per_channel else d_model, sum(self.sizes), bias=True)
        self.initialise()

    def initialise(self) -> None:
        nn.init.normal_(self.up.weight, std=0.02)
        if self.down is not None:
            nn.init.orthogonal_(self.down.weight)  # so the noise is as small as without a map of low rank
        biases = (
            torch.full((n,), self.starts.get(name, 0.0)) for (name, _), n in zip(self.parts, self.sizes, strict=True)
        )
        with torch.no_grad():
            self.up.bias.copy_(torch.cat(list(biases)))

    def forward(self, x: Tensor) -> tuple[Gates, Tensor | None]:
        """The gates θ, η, α of x [B, T, d_model], and δ [B, T, H] where the bias learns one.

        With channel gates θ and α are tuples of one [B, T, H, out] per map, δ is [B, T, H, D].
        """
        logits = self.up(x if self.down is None else self.down(x))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        delta, sizes = None, self.sizes
        if self.parts[-1][0] == "delta":
            logits, raw = logits.split([logits.shape[-1] - sizes[-1], sizes[-1]], -1)
            delta, sizes = F.softplus(self._per_head(raw)), sizes[:-1]
        found: dict[str, list[Tensor]] = {"theta": [], "eta": [], "alpha": []}
        for (name, _), gate in zip(self.parts, torch.sigmoid(logits).split(sizes, -1), strict=False):
            found[name].append(gate if name == "eta" else self._per_head(gate))
        eta = found["eta"][0] if found["eta"] else None
        cap = self.theta_max
        if eta is not None and not self.per_chunk:
            cap = self.theta_max * (1 - eta)
            cap = cap.unsqueeze(-1) if self.per_channel else cap
        thetas, alphas = [gate * cap for gate in found["theta"]], found["alpha"]
        if self.per_channel:
            return Gates(tuple(thetas), eta, tuple(alphas) or None, None), delta
        return Gates(thetas[0], eta, alphas[0] if alphas else None, None), delta

    def _per_head(self, gate: Tensor) -> Tensor:
        return gate.unflatten(-1, (self.heads, -1)) if self.per_channel else gate


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
