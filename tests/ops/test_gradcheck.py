"""torch.autograd.gradcheck on the fast engine: one case per bias and per retention gate, numerically and on its own."""

import pytest
import torch

from members import ALGORITHMS, BIASES, RETENTIONS
from titans.miras import MLP, MirasConfig
from titans.ops.memory import memory_scan

TOKENS, WIDTH = 4, 3


def check(miras):
    random = torch.Generator().manual_seed(0)
    shapes = miras.architecture.shapes(WIDTH)

    def draw(*shape, low=None, high=1.0):
        if low is None:
            return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()
        drawn = torch.rand(*shape, generator=random, dtype=torch.float64) * (high - low) + low
        return drawn.requires_grad_()

    def gates(low, high):
        if miras.gates == "head":
            return (draw(1, TOKENS, 1, low=low, high=high),)
        return tuple(draw(1, TOKENS, 1, s[0], low=low, high=high) for s in shapes)

    vectors = tuple(draw(1, TOKENS, 1, WIDTH) for _ in range(3))
    theta, alpha = gates(0.05, 0.3), gates(0.05, 0.3)
    eta = (draw(1, TOKENS, 1, low=0.2),) if miras.algorithm.momentum else ()
    delta = (draw(1, TOKENS, 1, low=0.5, high=1.5),) if miras.bias.learned_delta else ()
    weights = tuple(draw(1, *s) for s in shapes)
    groups = [vectors, theta, alpha, eta, delta, weights]

    def outputs(*flat):
        rest, found = list(flat), []
        for group in groups:
            found.append(tuple(rest.pop(0) for _ in group))
        (q, k, v), th, al, et, de, w = found
        one = miras.gates == "head"
        y, state = memory_scan(
            q, k, v, th[0] if one else th, et[0] if et else None, al[0] if one else al,
            weights=w, miras=miras, chunk_size=3, delta=de[0] if de else None,
        )  # fmt: skip
        return y, *state.weights

    torch.autograd.gradcheck(outputs, [x for group in groups for x in group])


def rule(**choices):
    return MirasConfig(**{"architecture": MLP(expansion=1), "retention": "weight_decay", **choices})


@pytest.mark.parametrize("bias", list(BIASES))
def test_bias(bias):
    check(rule(bias=BIASES[bias], algorithm="gradient_descent"))


@pytest.mark.parametrize("retention", list(RETENTIONS))
def test_retention(retention):
    check(rule(retention=RETENTIONS[retention]))


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("gates", ["head", "channel"])
def test_algorithm_and_gates(algorithm, gates):
    check(rule(algorithm=ALGORITHMS[algorithm], gates=gates))
