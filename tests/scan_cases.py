"""Arguments of the memory operator for every rule, and what tests do with them."""

from __future__ import annotations

import torch

from members import ALGORITHMS, BIASES, NETWORKS, RETENTIONS
from titans.miras import MirasConfig
from titans.ops.memory import memory_scan

BATCH, HEADS, WIDTH = 2, 2, 6


def make(
    network="mlp", retention="sphere", algorithm="momentum", bias="l2", gates="head", forgetting=True, norm=True,
    tokens=7, seed=0, extreme=False,
):  # fmt: skip
    """Arguments of memory_scan in float64, every tensor a leaf.

    Gates of the size that a layer of ordinary width has. With much larger ones the recurrence itself is chaotic under
    the LN wrapper (rounding errors grow by 1e13 in 200 tokens), and no two exact algorithms agree.
    """
    architecture = NETWORKS[network].model_copy(update={"residual_norm": norm})
    bias, retention, algorithm = BIASES[bias], RETENTIONS[retention], ALGORITHMS[algorithm]
    miras = MirasConfig(architecture=architecture, bias=bias, retention=retention, algorithm=algorithm, gates=gates)
    random = torch.Generator().manual_seed(seed)
    shapes = miras.architecture.shapes(WIDTH)

    def draw(*shape, low=None, high=None):
        if low is None:
            return torch.randn(*shape, generator=random, dtype=torch.float64)
        return torch.rand(*shape, generator=random, dtype=torch.float64) * (high - low) + low

    shape = (BATCH, tokens, HEADS)

    def draw_gate(low, high):
        if gates == "head":
            return draw(*shape, low=low, high=high)
        return tuple(draw(*shape, s[0], low=low, high=high) for s in shapes)

    q, k, v = (torch.nn.functional.normalize(draw(*shape, WIDTH), dim=-1) for _ in range(3))
    theta, eta, alpha = draw_gate(0.001, 0.01), draw(*shape, low=0, high=1), draw_gate(0, 0.01)
    # Beyond the reach of rounding: on either side of a threshold the error signal differs.
    delta = draw(*shape, *([WIDTH] if gates == "channel" else []), low=0.5, high=1.5)
    if extreme:
        for _, gate in leaves({"eta": eta, "alpha": alpha}):
            gate[draw(*gate.shape) > 0.7] = 0
            # Nor do the wrapper and the sphere, which rescale what is left, bear total forgetting for long.
            if tokens <= 23 or (not norm and retention.name == "weight_decay"):
                gate[draw(*gate.shape) > 0.7] = 1
        for _, gate in leaves({"theta": theta}):
            gate[draw(*gate.shape) > 0.7] = 0
    weights = tuple(retention.initial(draw(HEADS, *s) / s[-1] ** 0.5) for s in shapes)
    tensors = {
        "q": q, "k": k, "v": v, "theta": theta,
        "eta": eta if algorithm.momentum else None, "alpha": alpha if forgetting else None,
        "weights": weights, "norm": (1 + 0.1 * draw(HEADS, WIDTH), 0.1 * draw(HEADS, WIDTH)) if norm else None,
        "delta": delta if bias.learned_delta else None,
        "steps": tuple(draw(HEADS, low=0.5, high=1.5) for _ in shapes) if algorithm.per_chunk else None,
    }  # fmt: skip
    for _, x in leaves(tensors):
        x.requires_grad_()
    return tensors, miras


def leaves(tensors):
    for name, value in tensors.items():
        for i, x in enumerate(value if isinstance(value, tuple) else (value,)):
            if x is not None:
                yield f"{name}.{i}", x


def state_tensors(state):
    found = []
    state.map(lambda x: found.append(x) or x)
    return found


def run(tensors, miras, chunk, engine="chunked", **options):
    return memory_scan(**tensors, miras=miras, chunk_size=chunk, engine=engine, **options)


PER_TOKEN = ("q", "k", "v", "theta", "eta", "alpha", "delta")


def pick(tensors, choose):
    """The arguments with ``choose`` applied to whatever has a column per token."""

    def of(name, x):
        if name not in PER_TOKEN or x is None:
            return x
        return tuple(map(choose, x)) if isinstance(x, tuple) else choose(x)

    return {n: of(n, x) for n, x in tensors.items()}


def cut(tensors, start, stop):
    return pick(tensors, lambda x: x[:, start:stop])
