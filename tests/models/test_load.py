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


def edited(folder, **changes):
    file = folder / "config.json"
    told = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in told.items() if name != "digest" or value is not None}))


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
    edited(folder, digest=None)  # a writer that knows of none
    assert torch.equal(load_model(folder)(ids()).logits, expected)


def hf_model(folder):
    return pytest.importorskip("titans.hf").TitansForCausalLM.from_pretrained(folder)


READERS = {"ours": load_model, "transformers": hf_model}
WRITERS = {
    "ours": lambda folder: None,
    "transformers": lambda folder: hf_model(folder).save_pretrained(folder),
    "in shards": lambda folder: hf_model(folder).save_pretrained(folder, max_shard_size="20KB"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_settings_of_another_model_are_refused_whoever_wrote_and_reads(folder, tmp_path, reader, writer):
    WRITERS[writer](folder)
    READERS[reader](folder)
    for change in ({"chunk_size": 2}, {"theta_max": 0.5}, {"rope_base": 10.0}, {"window": 3}, {"chunk_size": "4"}):
        before = (folder / "config.json").read_text()
        edited(folder, **change)
        with pytest.raises(ValueError, match=r"config\.json was edited or is of another model"):
            READERS[reader](folder)
        (folder / "config.json").write_text(before)
    other = small("MAC", chunk_size=2).float()
    torch.nn.init.ones_(other.head.weight)
    other.save_pretrained(tmp_path / "other")
    (folder / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"safetensors.* is damaged or of another model"):
        READERS[reader](folder)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_any_bit_of_weights_that_flipped_is_noticed(folder, reader, writer):
    WRITERS[writer](folder)
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=file.name):
            READERS[reader](folder)
        content[-3] ^= 1
        file.write_bytes(content)
    READERS[reader](folder)


def test_what_computes_nothing_may_be_edited_and_older_folders_say_nothing(folder):
    expected = load_model(folder)(ids()).logits
    edited(folder, max_seq_len=7, lr=0.1, gradient_checkpointing=True, transformers_version="9", use_cache=False)
    assert torch.equal(load_model(folder)(ids()).logits, expected)
    edited(folder, digest=None, chunk_size=2)
    assert not torch.equal(load_model(folder)(ids()).logits, expected)
    load_model(folder).save_pretrained(folder)
    assert load_model(folder).config.chunk_size == 2


@pytest.mark.parametrize("digest", [5, [], {}, {"config.json": 5}, "x"])
def test_a_digest_that_is_none_is_refused(folder, digest):
    edited(folder, digest=digest)
    with pytest.raises(ValueError, match=r"config\.json was edited"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b'{"d_model"', b"\xff\xfe", b"[" * 99_999, b'{"d_model": 8, "d_model": 12}'])
def test_a_damaged_configuration_is_named_by_its_file(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not JSON: "):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle.", b"\xff" * 99, (9).to_bytes(8, "little") + b"[[[[[[[[["])
def test_weights_of_another_kind_of_file_are_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file: "):
        load_model(folder)


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
