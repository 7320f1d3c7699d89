"""A model's folder gives the model that was saved, in every bit, or is refused by name."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny import ids, small
from titans.models import ModelState, build_model, load_model
from titans.training.data import load_saved_tokenizer

NAME = "model.blocks.0.ffn.up.weight"


@pytest.fixture
def folder(tmp_path):
    small("MAC").float().save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder, change):
    """Change tensors, keep what the file says of itself."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    tensors = load_file(file)
    save_file({**tensors, **change(tensors)}, file, told)


def spoilt(tensor, value):
    tensor = tensor.clone()
    tensor[0, 0] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {NAME: t[NAME].long()}, "up.weight must be floating point, got torch.int64"),
        (lambda t: {NAME: t[NAME] > 0}, "up.weight must be floating point, got torch.bool"),
        (lambda t: {NAME: spoilt(t[NAME], float("nan"))}, "up.weight has entries that are not finite"),
        (lambda t: {NAME: spoilt(t[NAME], float("inf"))}, "up.weight has entries that are not finite"),
        (lambda t: {"model.head.weight": t["model.embedding.weight"] + 1}, "head.weight differs from the embedding"),
    ],
)
def test_weights_that_are_none_are_named(folder, change, message):
    rewritten(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_head_that_is_the_embedding_may_be_written_out(folder):
    expected = load_model(folder)(ids()).logits
    rewritten(folder, lambda t: {"model.head.weight": t["model.embedding.weight"].clone()})
    assert torch.equal(load_model(folder)(ids()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_of_a_weight_is_lost_and_the_state_saved_beside_it_fits(tmp_path, dtype):
    model = small("MAC").to(dtype)
    model.save_pretrained(tmp_path)
    model(ids()).state.detach().save(tmp_path / "s.st")
    loaded = load_model(tmp_path)
    for (name, saved), (_, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert found.dtype == torch.promote_types(dtype, torch.float32) and torch.equal(saved.to(found), found), name
    state = ModelState.load(tmp_path / "s.st").to(found.dtype)
    assert torch.isfinite(loaded(ids(), state=state).logits).all()


@pytest.mark.parametrize("config", [{"d_model": 16}, None, "MAC"])
def test_what_is_no_configuration_is_named(config):
    with pytest.raises(ValueError, match="config must be a TitansConfig, got"):
        build_model(config)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"eos_token": "x"}}, "tokenizer"),  # the tokenizer itself is gone: no bytes
        ({"tokenizer_config.json": ["x"]}, "is no mapping in JSON"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config.json is no mapping in JSON"),
    ],
)
def test_a_tokenizer_that_is_lost_is_no_byte_tokenizer(tmp_path, files, message):
    for name, told in files.items():
        (tmp_path / name).write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(ValueError, match=message):
        load_saved_tokenizer(tmp_path)
