"""Nothing can be predicted about i.i.d. tokens: a model that gets below ln V reads the future."""

from __future__ import annotations

import math

import pytest
import torch

from titans import TitansConfig, build_model
from titans.data import iid_batch
from titans.training import build_optimizer

VOCABULARY = 8


@pytest.mark.parametrize("variant", ["LMM", "MAC", "MAG", "MAL"])
def test_random_tokens_are_not_predictable(variant):
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant, vocab_size=VOCABULARY, d_model=32, n_layers=1, n_persistent=2, chunk_size=8, segment_len=16,
        window=12,
    )  # fmt: skip
    model = build_model(config)
    optimizer = build_optimizer(model, lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids, labels = iid_batch(8, 48, VOCABULARY, random)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids, labels = iid_batch(256, 48, VOCABULARY, random)
        loss = model(ids, labels=labels).loss.item()
    assert math.log(VOCABULARY) - 0.01 <= loss <= math.log(VOCABULARY) + 0.1
