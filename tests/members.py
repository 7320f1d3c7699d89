"""Every registered member of the four axes, in the variants that differ in arithmetic, and pairs of choices to test.

A member that is registered without an entry here takes part with its default arguments.
"""

from __future__ import annotations

import itertools
import random

import torch

from titans.miras import (
    MLP,
    Algorithm,
    Bias,
    ElasticNet,
    ErrorSignal,
    Huber,
    KLRetention,
    Lp,
    LqRetention,
    Network,
    Retention,
    Robust,
)

VARIANTS = {
    "lp": {"lp1.5": Lp(p=1.5), "lp2.5": Lp(p=2.5), "lp3": Lp(p=3), "lp4": Lp(p=4)},
    "huber": {
        **{f"huber_{form}": Huber(delta=1.1, form=form) for form in ("coordinate", "vector", "mixture")},
        **{f"huber_{form}_learned": Huber(delta="learned", form=form) for form in ("coordinate", "vector", "mixture")},
    },
    "robust": {"robust": Robust(radius=0.3)},
    "error_signal": {"error_signal": ErrorSignal(function=torch.tanh)},
    "lq": {"lq4": LqRetention(q=4), "lq1.5": LqRetention(q=1.5)},
    "kl": {"kl": KLRetention(scale=2.0)},
    "elastic_net": {"elastic_net": ElasticNet(l1=0.05)},
    "mlp": {
        "mlp": MLP(depth=2, expansion=2),
        "mlp3": MLP(depth=3, expansion=1.5, activation="silu"),
    },
}


def _all(axis: type) -> dict:
    found = {}
    for name, member in axis.members.items():
        found.update(VARIANTS.get(name) or {name: member()})
    return found


BIASES, RETENTIONS, ALGORITHMS, NETWORKS = (_all(axis) for axis in (Bias, Retention, Algorithm, Network))


def pairwise(**axes: list) -> list[dict]:
    """Few cases in which every two values of two different axes meet at least once."""
    names, draw = list(axes), random.Random(0)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
    }  # fmt: skip
    cases = []
    while missing:
        a, x, b, y = min(missing, key=str)
        tries = [{**{n: draw.choice(v) for n, v in axes.items()}, a: x, b: y} for _ in range(50)]
        case = max(tries, key=lambda c: len(_pairs(c) & missing))
        missing -= _pairs(case)
        cases.append(case)
    return cases


def _pairs(case: dict) -> set:
    return {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(case.items(), 2)}
