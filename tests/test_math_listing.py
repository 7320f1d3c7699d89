"""docs/math.md: its listing is run as printed and the engine agrees; its table of sizes is that of the presets."""

import re
from pathlib import Path

import pytest
import torch

from helpers import assert_close
from titans import MirasConfig, TitansConfig
from titans.miras import MLP
from titans.ops import memory_scan

PAGE = Path(__file__).parents[1] / "docs" / "math.md"
T, HEADS, D, HIDDEN = 13, 2, 5, 7


@pytest.fixture(scope="module")
def listing():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["memory"]


def problem():
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, k, v = draw(3, T, HEADS, D)
    theta, eta, alpha = draw(3, T, HEADS).sigmoid()
    weights = draw(HEADS, HIDDEN, D) / D**0.5, draw(HEADS, D, HIDDEN) / HIDDEN**0.5
    return (q, k, v, 0.1 * theta, eta, 0.3 * alpha), weights


@pytest.mark.parametrize("rule", ["titans", "steady"])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 16])
def test_the_listing_is_what_the_engine_computes(listing, rule, chunk_size):
    tensors, weights = problem()
    miras = getattr(MirasConfig, rule)(architecture=MLP(expansion=HIDDEN / D))
    y, state = memory_scan(*(x[None] for x in tensors), weights=weights, miras=miras, chunk_size=chunk_size)
    for head in range(HEADS):
        mine = (x[:, head] for x in tensors)
        reads, A, S = listing(*mine, tuple(w[head] for w in weights), chunk_size, rule)
        assert_close(y[0, :, head], reads, f"reads of head {head}")
        if T % chunk_size == 0:
            for name, found, expected in (("A", state.weights, A), ("S", state.momentum, S)):
                for i, tensor in enumerate(expected):
                    assert_close(found[i][0, head], tensor, f"{name} of map {i}, head {head}")


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "base400", "large"])
def test_the_table_of_sizes(size):
    (row,) = re.findall(rf"^\| `{size}` \|.*$", PAGE.read_text(), re.MULTILINE)
    width, heads, head, *layers = map(int, re.findall(r"\d+", row.replace(",", "").split(" M |")[1]))
    variants = ["LMM", "MAC", "MAG", "MAL", "transformer", "swa"]
    presets = [TitansConfig.preset(size, variant) for variant in variants]
    assert {(p.d_model, p.attention_heads, p.memory_heads) for p in presets} == {(width, heads, heads)}
    assert head * heads == width
    assert [p.n_layers for p in presets] == [*layers, layers[-1]]
