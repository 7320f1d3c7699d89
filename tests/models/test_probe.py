"""What a probe says about the memories, and that it leaves the model as it was."""

import math

import pytest
import torch

from titans import MirasConfig, TitansConfig, build_model
from titans.memory import NeuralMemory
from titans.models import probe_memories

TINY = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "chunk_size": 4, "segment_len": 8, "window": 8}


def model_of(variant, **changes):
    torch.manual_seed(0)
    return build_model(TitansConfig(variant=variant, **{**TINY, "n_persistent": 0, **changes}))


def ids(rows=2, tokens=21):
    return torch.randint(0, 40, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", ["LMM", "MAC", "MAG", "MAL"])
def test_one_reading_per_layer_and_the_model_as_it_was(variant):
    model = model_of(variant, n_persistent=3)
    before = model(ids()).logits
    readings = probe_memories(model, ids())
    assert len(readings) == 2
    for reading in readings:
        assert 0 < reading.theta < 1 / 16
        assert 0.4 < reading.eta < 0.6 and 0.0005 < reading.alpha < 0.005
        assert reading.half_life == pytest.approx((math.log(2) / reading.alpha,), rel=0.1)
        assert reading.weight_norm == pytest.approx(1, abs=1e-5)  # sphere keeps every row's norm
        assert reading.moved > 0 and reading.surprise > 0
        assert 0 < reading.loss_after < reading.loss_before
    assert torch.equal(model(ids()).logits, before)
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, NeuralMemory))


def test_an_lmm_layer_reads_as_its_memory_traces():
    model = model_of("LMM", n_layers=1)
    block = model.blocks[0]
    x = block.mixer_norm(model.embedding(ids()))
    trace = block.mixer.branch.memory.trace(x)
    reading = probe_memories(model, ids())[0]
    closed = ~trace.after.isnan()
    assert reading.theta == pytest.approx(trace.theta.mean().item())
    assert reading.loss_before == pytest.approx(trace.loss[closed].mean().item())
    assert reading.loss_after == pytest.approx(trace.after[closed].mean().item())


def test_a_probe_starts_where_the_streams_stand():
    model = model_of("LMM", miras=MirasConfig.titans())
    state = model(ids()).state
    fresh, later = probe_memories(model, ids()), probe_memories(model, ids(), state)
    assert later[0].moved > fresh[0].moved
    with pytest.raises(ValueError, match="state must have all rows at the same place"):
        probe_memories(model, ids(), state.reset([0]))


def test_rules_without_a_gate_and_models_without_a_memory():
    readings = probe_memories(model_of("LMM", miras="yaad", use_decay=False), ids())
    assert (readings[0].eta, readings[0].alpha, readings[0].half_life) == (None, None, None)
    assert probe_memories(model_of("swa"), ids()) == []
    with pytest.raises(ValueError, match="input_ids must have at least chunk_size = 4 tokens, got 3"):
        probe_memories(model_of("LMM"), ids(tokens=3))
