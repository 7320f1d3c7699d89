"""What the tests of the fast engines share: rules and odd sizes, random arguments, and the loop over chunks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import assert_close
from titans.miras import MLP, GradientDescent, Matrix, MirasConfig, Momentum
from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.chunked import whole_chunk
from titans.ops.memory.decay import Decay
from titans.ops.memory.rule import RowRule
from titans.ops.memory.tokens import Gates, Tokens

ROWS, CHUNKS, WIDTH, HIDDEN = 3, 3, 6, 10


@dataclass(frozen=True)
class Case:
    """One rule and size."""

    size: int = 5
    network: str = "gelu"
    retention: str = "anchored"
    momentum: bool = True
    forgetting: bool = True
    norm: bool = True
    masked: bool = False
    chunks: int = CHUNKS

    @property
    def miras(self):
        network = Matrix() if self.network == "matrix" else MLP(activation=self.network, expansion=HIDDEN / WIDTH)
        return MirasConfig(
            architecture=network.model_copy(update={"residual_norm": self.norm}),
            retention=self.retention,
            algorithm=Momentum() if self.momentum else GradientDescent(),
        )


CASES = {
    "anchored": Case(),
    "sphere": Case(retention="sphere"),
    "weight decay": Case(retention="weight_decay"),
    "silu": Case(network="silu"),
    "matrix": Case(network="matrix"),
    "matrix, weight decay, no norm": Case(network="matrix", retention="weight_decay", norm=False),
    "matrix, sphere, no momentum": Case(network="matrix", retention="sphere", momentum=False),
    "no momentum": Case(momentum=False),
    "no momentum, weight decay": Case(momentum=False, retention="weight_decay"),
    "no forgetting": Case(forgetting=False),
    "no forgetting, sphere, no momentum": Case(forgetting=False, retention="sphere", momentum=False),
    "nothing but writes": Case(forgetting=False, retention="weight_decay", momentum=False, norm=False),
    "no norm": Case(norm=False),
    "sphere, no norm, silu": Case(norm=False, retention="sphere", network="silu"),
    "masked": Case(masked=True),
    "masked, weight decay": Case(masked=True, retention="weight_decay", size=16),
    "masked, no momentum": Case(masked=True, momentum=False),
    "chunks of 1": Case(size=1),
    "chunks of 1, weight decay": Case(size=1, retention="weight_decay"),
    "chunks of 1, matrix": Case(size=1, network="matrix", momentum=False),
    "chunks of 16": Case(size=16),
    "chunks of 16, weight decay": Case(size=16, retention="weight_decay", network="silu"),
    "one chunk": Case(chunks=1),
    "long chunks": Case(size=65, chunks=2),
    "long chunks, weight decay": Case(size=65, chunks=2, retention="weight_decay", momentum=False),
}


def arguments(case: Case, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    """Random arguments by name, all that are differentiated requiring a gradient."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=random, dtype=torch.float64) * scale

    def uniform(low, high):
        return torch.rand(ROWS, case.chunks * case.size, generator=random, dtype=torch.float64) * (high - low) + low

    hidden = WIDTH if case.network == "matrix" else HIDDEN
    shapes = [(WIDTH, WIDTH)] if case.network == "matrix" else [(hidden, WIDTH), (WIDTH, hidden)]
    tokens = (ROWS, case.chunks * case.size, WIDTH)
    found = {"q": normal(*tokens), "k": normal(*tokens), "v": normal(*tokens), "theta": uniform(0.02, 0.2)}
    if case.momentum:
        found["eta"] = uniform(0, 0.9)
        found |= {f"momentum{i}": normal(ROWS, *s, scale=0.1) for i, s in enumerate(shapes)}
    if case.forgetting:
        found["alpha"] = uniform(0, 0.3)
    if case.masked:
        found["write"] = (uniform(0, 1) < 0.6).double()
    if case.norm:
        found |= {"gain": 1 + normal(ROWS, 1, WIDTH, scale=0.2), "bias": normal(ROWS, 1, WIDTH, scale=0.2)}
    found |= {f"weights{i}": normal(ROWS, *s, scale=s[-1] ** -0.5) for i, s in enumerate(shapes)}
    if case.retention != "weight_decay":
        found |= {f"anchors{i}": normal(ROWS, *s, scale=s[-1] ** -0.5) for i, s in enumerate(shapes)}
    return {name: x.to(dtype).requires_grad_(name != "write") for name, x in found.items()}


def maps(x, name):
    return tuple(x[f"{name}{i}"] for i in range(2) if f"{name}{i}" in x)


def expected(case: Case, x: dict[str, Tensor]):
    """The loop over ``whole_chunk``."""
    miras, anchors = case.miras, maps(x, "anchors")
    kept = None if miras.retention.identity else tuple(map(miras.retention.anchor, anchors))
    rule = RowRule(miras, anchors, kept, x.get("gain"), x.get("bias"))
    gates = Gates(*(x.get(name) for name in ("theta", "eta", "alpha", "write")))
    weights, momentum, outputs = maps(x, "weights"), maps(x, "momentum"), []
    used = rule.use(weights)
    for part in Tokens(x["q"], x["k"], x["v"], gates).split([case.size] * case.chunks):
        y, weights, momentum, used = whole_chunk(rule, weights, momentum, used, part, Decay.of(part.gates))
        outputs.append(y)
    return torch.cat(outputs, 1), weights, momentum


def bound(case: Case, x: dict[str, Tensor]) -> ChunkRule:
    return ChunkRule.of(case.miras, case.size, maps(x, "anchors"), x.get("gain"), x.get("bias"))


def call(engine, case: Case, x: dict[str, Tensor], rule: ChunkRule | None = None, **options):
    gates = Gates(*(x.get(name) for name in ("theta", "eta", "alpha", "write")))
    tokens = Tokens(x["q"], x["k"], x["v"], gates)
    return engine(rule or bound(case, x), tokens, maps(x, "weights"), maps(x, "momentum"), **options)


def gradients(result, x: dict[str, Tensor], seed=1) -> dict[str, Tensor]:
    """Of a random linear function of outputs and end state."""
    random = torch.Generator().manual_seed(seed)
    y, weights, momentum = result
    total = sum(
        (out * torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)).sum()
        for out in (y, *weights, *momentum)
    )
    wanted = {name: t for name, t in x.items() if t.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), found)}


def assert_same(case: Case, x: dict[str, Tensor], result, tolerance=None):
    wanted = expected(case, x)
    names = ["y", *(f"weights[{i}]" for i in range(len(wanted[1]))), *(f"momentum[{i}]" for i in range(len(wanted[2])))]
    flat = [[r[0], *r[1], *r[2]] for r in (result, wanted)]
    for name, actual, reference in zip(names, *flat, strict=True):
        assert_close(actual, reference, name, tolerance)
    found, reference = gradients(result, x), gradients(wanted, x)
    for name in reference:
        assert_close(found[name], reference[name], f"gradient of {name}", tolerance)
