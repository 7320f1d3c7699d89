"""Loss by position, read piece by piece."""

import pytest
import torch
import torch.nn.functional as F

from titans import TitansConfig, build_model
from titans.evaluation import nats_by_position


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(
        TitansConfig(variant="MAG", vocab_size=40, d_model=16, n_layers=1, chunk_size=4, window=8)
    ).double()


def ids(tokens=30):
    return torch.randint(0, 40, (3, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("segment", [1, 7, 29, 30, 64])
def test_pieces_give_what_one_call_gives(model, segment):
    with torch.no_grad():
        logits = model(ids()).logits
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids()[:, 1:], reduction="none").mean(0)
    found = nats_by_position(model, ids().split(2), segment=segment)
    assert torch.allclose(found, expected, atol=1e-9, rtol=0)


def test_reset_and_off_begin_like_on_and_then_differ(model):
    on, reset, off = (nats_by_position(model, [ids()], segment=8, memory=mode) for mode in ("on", "reset", "off"))
    assert torch.allclose(on[:8], reset[:8], atol=1e-12, rtol=0)
    assert (on[8:] - reset[8:]).abs().min() > 0
    assert (on[4:] - off[4:]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="segment must be at least 1"):
        nats_by_position(model, [ids()], segment=0)
