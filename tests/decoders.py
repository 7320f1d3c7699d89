"""Tiny pretrained decoders of three families, and the same with memories beside their layers."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from titans.hf import graft, grafts

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128,
}  # fmt: skip
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **TOKENS, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **TOKENS)),
}
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def pretrained(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def opened(family, **fields):
    """A grafted model whose gates are open."""
    model = graft(pretrained(family), [0, 2], chunk_size=4, **fields)
    torch.manual_seed(7)
    with torch.no_grad():
        for found in grafts(model).values():
            found.gate.normal_(std=2)
    return model
