"""A tiny model behind transformers' doors."""

import pytest
import torch
from transformers.utils import logging

from titans.hf import TitansForCausalLM, TitansHFConfig
from titans.models import TitansConfig

logging.disable_progress_bar()


def tiny(**changes) -> TitansForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 64, "d_model": 16, "n_layers": 2, "chunk_size": 4, "segment_len": 8, "window": 6,
        "n_persistent": 2, **changes,
    }  # fmt: skip
    if fields.get("variant", "MAC") != "MAC":
        del fields["segment_len"]
    return TitansForCausalLM(TitansHFConfig(TitansConfig(**fields))).eval()


@pytest.fixture
def make():
    """Function that makes a tiny `TitansForCausalLM`."""
    return tiny


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    """The first row has six columns of padding on the left."""
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    return mask
