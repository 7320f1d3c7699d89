"""What stands at padding is nobody's: not even a NaN there reaches outputs, states or gradients."""

import math

import pytest
import torch

from helpers import assert_close
from tiny import ALL, small
from titans.memory import NeuralMemory


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("left", [True, False])
def test_nan_vectors_at_padding_change_nothing(variant, left):
    torch.manual_seed(0)
    model = small(variant)
    ids = torch.randint(model.config.vocab_size, (2, 14))
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, slice(0, 5) if left else slice(9, 14)] = False
    given = model.embedding(ids).detach()
    grads = []
    for filler in (0.0, math.nan):
        vectors = given.masked_fill(~mask.unsqueeze(-1), filler).requires_grad_()
        model.zero_grad()
        model(inputs_embeds=vectors, attention_mask=mask, labels=ids).loss.backward()
        assert vectors.grad is not None and not vectors.grad[~mask].any()
        grads.append([vectors.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, with_nan in zip(*grads, strict=True):
        assert_close(with_nan, plain)


def test_nan_inputs_at_padding_of_a_memory_layer_change_no_gradient():
    torch.manual_seed(0)
    memory = NeuralMemory(16, n_heads=2, chunk_size=4).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    x[1, :4] = math.nan
    memory(x, mask=mask).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())
