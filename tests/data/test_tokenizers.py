"""Bytes and local Hugging Face tokenizers."""

import builtins
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans.data import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_array(text).tolist() == ids


def test_bytes_that_are_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.encode("\ud800") == [ord("?")]
    assert tokenizer.separator_id == 0
    with pytest.raises(ValueError, match="ids: 256 is not a byte"):
        tokenizer.decode([65, 256])


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A word-level tokenizer whose end token only tokenizer_config.json gives away."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, "<end>": 1, "memory": 2, "learns": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", vocab["<end>"])]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return tmp_path


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_local_tokenizer_from_folder_and_file(tokenizer_folder, name):
    tokenizer = load_tokenizer(tokenizer_folder / name)
    assert tokenizer.vocab_size == 4
    assert tokenizer.separator_id == 1
    # The end token that the file's own template would add is left to the caller.
    assert tokenizer.encode("memory learns") == [2, 3]
    assert tokenizer.encode_array("learns memory").tolist() == [3, 2]
    assert tokenizer.decode(np.array([2, 3])) == "memory learns"


def test_separator_is_known_named_or_an_error(tokenizer_folder):
    (tokenizer_folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="separator: an end-of-text token"):
        load_tokenizer(tokenizer_folder)
    with pytest.raises(ValueError, match="separator: '<stop>'"):
        HuggingFaceTokenizer(tokenizer_folder, separator="<stop>")
    assert HuggingFaceTokenizer(tokenizer_folder, separator="learns").separator_id == 3


def test_saved_tokenizer_is_the_same(tokenizer_folder):
    saved = HuggingFaceTokenizer(tokenizer_folder, separator="learns")
    saved.save(tokenizer_folder / "deep" / "copy")
    loaded = load_tokenizer(tokenizer_folder / "deep" / "copy")
    assert loaded.separator_id == saved.separator_id == 3
    assert loaded.encode("memory learns") == saved.encode("memory learns")


def test_folder_in_another_form_is_converted(tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_folder / "bpe"
    folder.mkdir()
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert hasattr(transformers, "GPT2Tokenizer")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("abb") == [3, 2]
    assert tokenizer.separator_id == 0


def test_wrong_paths_name_the_field(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: 'no-such' is neither"):
        load_tokenizer("no-such")
    with pytest.raises(ValueError, match="tokenizer: .* holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        load_tokenizer(tmp_path)


def test_missing_library_names_the_extra(tokenizer_folder, monkeypatch):
    real_import = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name.startswith("tokenizers"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ImportError, match=r"titans-miras\[train\]"):
        load_tokenizer(tokenizer_folder)
