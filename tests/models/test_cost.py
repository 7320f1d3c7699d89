"""The cost of one block, scaled, is the cost of the model."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans.models import TitansConfig, build_model, count_parameters
from titans.models.cost import measure_cost


@pytest.mark.parametrize(
    ("variant", "tied", "layers"),
    [
        ("LMM", True, None), ("MAC", False, None), ("MAG", True, None), ("MAL", True, None),
        ("transformer", False, None), ("swa", True, None), ("MAC", True, (1,)), ("MAG", False, (0, 2)),
        ("LMM", True, ()),
    ],
)  # fmt: skip
def test_it_is_what_the_whole_model_has_and_does(variant, tied, layers):
    config = TitansConfig(
        variant=variant, vocab_size=50, d_model=32, n_layers=3, memory_layers=layers, chunk_size=4, segment_len=8,
        window=10, n_persistent=2, max_seq_len=32, tie_embeddings=tied,
    )  # fmt: skip
    cost = measure_cost(config)
    model = build_model(config, "chunked").requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(torch.ones((1, cost.tokens), dtype=torch.int64))
    assert cost.parameters == count_parameters(model)
    assert cost.flops_per_token == pytest.approx(counter.get_total_flops() / cost.tokens)
    assert cost.state_bytes == out.state.nbytes


@pytest.mark.parametrize("variant", ["LMM", "MAC", "MAG", "MAL"])
@pytest.mark.parametrize("persistent", [0, 1, 3, 4, 6])
def test_the_state_is_counted_where_it_is_fullest(variant, persistent):
    config = TitansConfig(
        variant=variant, vocab_size=5, d_model=16, n_layers=1, chunk_size=4, segment_len=8, window=4,
        n_persistent=persistent, max_seq_len=24,
    )  # fmt: skip
    model, most = build_model(config), 0
    with torch.no_grad():
        for tokens in range(17, 33):
            most = max(most, model(torch.zeros((1, tokens), dtype=torch.int64)).state.nbytes)
    assert measure_cost(config).state_bytes == most
    short = TitansConfig(variant=variant, vocab_size=5, d_model=16, n_layers=1, chunk_size=4, n_persistent=3)
    assert 1 <= measure_cost(short, longest=4).tokens <= 4


CHANGES = {  # of the table in docs/state.md, cell by cell
    "8 layers": {"n_layers": 8}, "width 512 (and 8 heads)": {"d_model": 512, "mem_heads": 8},
    "1 memory head": {"mem_heads": 1}, "8 memory heads": {"mem_heads": 8}, "a matrix memory (`mem_layers=1`)":
    {"mem_layers": 1}, "512 hidden units": {"d_hidden": 512}, "no momentum": {"use_momentum": False},
    "MAC, segments of 64": {"variant": "MAC", "segment_len": 64},
    "MAC, segments of 512": {"variant": "MAC", "segment_len": 512},
    "MAG, MAL, window 512": {"variant": "MAG", "window": 512}, "MAG, window 128": {"variant": "MAG", "window": 128},
    "sliding window alone, 512": {"variant": "swa", "window": 512},
}  # fmt: skip


def test_the_page_on_states_tells_their_sizes():
    page = (Path(__file__).parents[2] / "docs" / "state.md").read_text(encoding="utf-8")
    base = {"variant": "LMM", "vocab_size": 256, "d_model": 256, "n_layers": 4, "chunk_size": 64}
    assert f"{measure_cost(TitansConfig(**base)).state_bytes:,} bytes" in page
    told = dict(re.findall(r"\| ([^|]+?) \| (\d+\.\d) (?=\|)", page))
    assert told == {
        name: f"{measure_cost(TitansConfig(**{**base, **change})).state_bytes / 1e6:.1f}"
        for name, change in CHANGES.items()
    }


def test_it_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    measure_cost(TitansConfig(d_model=16, n_layers=1, chunk_size=4, max_seq_len=8))
    assert torch.equal(torch.get_rng_state(), before)
