"""The rules that the fast engines know: one dataclass, and why another rule is not among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from titans.miras import L2, AnchoredRetention, GradientDescent, MirasConfig, Momentum, SphereRetention, WeightDecay
from titans.miras.networks import MLP, Matrix
from titans.ops.memory.tokens import Tokens

RetentionName = Literal["weight_decay", "sphere", "anchored"]
Maps = tuple[Tensor, ...]
# Classes, not names: one derived from them may compute something else, and need not have a name of its own.
RETENTIONS: dict[type, RetentionName] = {
    WeightDecay: "weight_decay", SphereRetention: "sphere", AnchoredRetention: "anchored",
}  # fmt: skip


@dataclass(frozen=True)
class ChunkRule:
    """An l2 memory of one matrix, or of two with an activation between them, one gate per token and head.

    G batch times heads, D head width, H hidden width.

    Attributes:
        activation: between the two maps; None: the memory is one matrix.
        retention: what becomes of the weights when a chunk closes.
        chunk_size: C ≥ 1.
        anchors: A_0 per map, [G, out, in]; None with weight_decay, which needs none.
        gain, bias: of the wrapper M(x) = x + LN(f(x)) gain + bias, [G, 1, D]; None without it.
    """

    activation: Literal["gelu", "silu"] | None
    retention: RetentionName
    chunk_size: int
    anchors: Maps | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.activation not in ("gelu", "silu", None):
            raise ValueError(f"activation must be 'gelu', 'silu' or None, got {self.activation!r}")
        if self.retention not in get_args(RetentionName):
            raise ValueError(f"retention must be one of {', '.join(get_args(RetentionName))}, got {self.retention!r}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if (self.gain is None) != (self.bias is None):
            raise ValueError("gain and bias of the wrapper go together, got one of them")
        if (self.anchors is not None) != self.projects:
            raise ValueError(f"anchors must be {'given' if self.projects else 'None'} with {self.retention!r}")

    @classmethod
    def of(
        cls, miras: MirasConfig, chunk_size: int, weights: Maps, gain: Tensor | None, bias: Tensor | None
    ) -> ChunkRule:
        """The rule of ``miras``; ``weights`` are the learned A_0, expanded to every row.

        Raises:
            ValueError: the fast engines do not know it.
        """
        if reason := unsupported(miras):
            raise ValueError(f"the fast engines do not know this rule: {reason}")
        network, name = miras.architecture, RETENTIONS[type(miras.retention)]
        activation = network.activation if isinstance(network, MLP) else None
        return cls(activation, name, chunk_size, None if name == "weight_decay" else weights, gain, bias)

    @property
    def maps(self) -> int:
        return 1 if self.activation is None else 2

    @property
    def projects(self) -> bool:
        """Are rows scaled back to A_0's norms when a chunk closes?"""
        return self.retention != "weight_decay"

    @property
    def pulls(self) -> bool:
        """Is forgetting a pull towards A_0 that shows at the chunk's end only?"""
        return self.retention == "anchored"


def unsupported(miras: MirasConfig) -> str | None:
    """Why the fast engines do not know this rule, as the end of a sentence; None where they do."""
    network = miras.architecture
    if type(network) is not Matrix and not (type(network) is MLP and network.depth == 2):
        return f"architecture {network!r} is neither a matrix nor an MLP of depth 2"
    if type(miras.bias) is not L2:
        return f"bias {miras.bias!r} is not l2"
    if type(miras.retention) not in RETENTIONS:
        return f"retention {miras.retention!r} is not one of {', '.join(RETENTIONS.values())}"
    if type(miras.algorithm) not in (GradientDescent, Momentum):
        return f"algorithm {miras.algorithm!r} is not one of gradient_descent, momentum"
    if miras.gates != "head":
        return f"gates are per {miras.gates}, not per head"
    return None


def head_gates(tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """θ, η, α and where writes are allowed, one number per token and row."""
    gates = tokens.gates
    if isinstance(gates.theta, tuple) or isinstance(gates.alpha, tuple):
        raise ValueError("gates must be per head, got gates per channel")
    return gates.theta, gates.eta, gates.alpha, gates.write


def check_run(rule: ChunkRule, tokens: Tokens, weights: Maps, momentum: Maps) -> None:
    """Raise a ValueError that names what does not fit."""
    q, k, v = tokens.q, tokens.k, tokens.v
    gates = dict(zip(("theta", "eta", "alpha", "write"), head_gates(tokens), strict=True))
    if q.dim() != 3 or 0 in q.shape or q.shape[1] % rule.chunk_size:
        raise ValueError(f"q must be [G, n*{rule.chunk_size}, D] with whole chunks, got {list(q.shape)}")
    rows, columns, width = q.shape
    wanted = {name: [rows, columns, width] for name in ("k", "v")}
    given = {"k": k, "v": v} | {name: g for name, g in gates.items() if g is not None}
    wanted |= {name: [rows, columns] for name in gates}
    if rule.maps != len(weights):
        raise ValueError(f"weights must be {rule.maps} maps, got {len(weights)}")
    hidden = weights[0].shape[1] if rule.maps == 2 else width
    shapes = [[rows, hidden, width], [rows, width, hidden]][-rule.maps :]
    if bool(momentum) != (gates["eta"] is not None):
        raise ValueError(f"momentum must be {'empty without' if momentum else 'given with'} eta")
    for group, maps in (("weights", weights), ("momentum", momentum), ("anchors", rule.anchors or ())):
        given |= {f"{group}[{i}]": w for i, w in enumerate(maps)}
        wanted |= {f"{group}[{i}]": s for i, s in enumerate(shapes)}
    if rule.gain is not None and rule.bias is not None:
        given |= {"gain": rule.gain, "bias": rule.bias}
        wanted |= {name: [rows, 1, width] for name in ("gain", "bias")}
    for name, x in given.items():
        if list(x.shape) != wanted[name] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {wanted[name]} {q.dtype} on {q.device}, got {list(x.shape)} {x.dtype} on {x.device}"
            )
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the fast engines compute in float32 or float64, got {q.dtype}")
