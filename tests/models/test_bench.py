"""What the bench counts and times; how long anything takes is nobody's law."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans.models import TitansConfig, build_model
from titans.models.bench import measure_speed, products_of

SIZES = {"vocab_size": 50, "d_model": 16, "n_layers": 2, "chunk_size": 4, "n_persistent": 2, "window": 6}
CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["LMM", "MAC", "MAG", "transformer"])
def test_products_are_those_that_a_counter_of_operations_finds(variant):
    model, ids = build_model(TitansConfig(variant=variant, **SIZES), "chunked"), torch.ones(1, 9, dtype=torch.int64)
    model.requires_grad_(False)  # or the counter looks for gradients under no_grad
    found = products_of(lambda: model(ids))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert sum(2 * b * m * k * n * times for (b, m, k, n), times in found.items()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("what", "variant", "by"),
    [("memory", "MAG", "exact for this rule"), ("model", "MAC", "exact for this rule"),
     ("decode", "MAC", "decoding: step"), ("decode", "transformer", "decoding: general"), ("model", "swa", "")],
)  # fmt: skip
def test_every_figure_is_there(what, variant, by):
    config = TitansConfig(variant=variant, **SIZES)
    speed = measure_speed(what, config, CPU, tokens=12, batch=2, rounds=3)
    assert speed.tokens == (32 if what == "decode" else 24)
    assert len(speed.seconds) == len(speed.limit) == 3 and speed.rates == sorted(speed.rates)
    figures = (*speed.rates, *speed.limit, speed.gigaflops, speed.share)
    assert all(x > 0 and math.isfinite(x) for x in figures)
    assert speed.peak_bytes > 1e7 and by in speed.by and bool(speed.by) == bool(by)


def test_a_backward_pass_has_twice_the_products_and_decoding_one_token_at_a_time():
    config = TitansConfig(variant="LMM", **SIZES)
    model = build_model(config, "chunked")
    once = products_of(lambda: model(torch.ones(2, 12, dtype=torch.int64)))
    forward = sum(2 * b * m * k * n * times for (b, m, k, n), times in once.items())
    assert measure_speed("model", config, CPU, tokens=12, batch=2, rounds=1).flops == 3 * forward
    assert measure_speed("decode", config, CPU, tokens=12, batch=2, rounds=1).flops < 16 * forward / 4


def test_a_configuration_without_a_memory_is_refused():
    with pytest.raises(ValueError, match="variant 'swa' has no memory"):
        measure_speed("memory", TitansConfig(variant="swa", **SIZES), CPU)
