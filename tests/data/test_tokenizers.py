"""Bytes and local Hugging Face tokenizers."""

import builtins
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans.data import ByteTokenizer, HuggingFaceTokenizer, TokenDocuments, load_tokenizer


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_array(text).tolist() == ids
    assert [array.tolist() for array in tokenizer.encode_with_bytes(text)] == [ids, [1] * len(ids)]


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


def test_stored_truncation_and_padding_are_ignored(tokenizer_folder):
    file = str(tokenizer_folder / "tokenizer.json")
    backend = pytest.importorskip("tokenizers").Tokenizer.from_file(file)
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(file)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.encode("memory learns " * 3) == [2, 3] * 3
    assert tokenizer.encode("memory") == [2]


def test_vocab_size_covers_gaps(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"</s>": 0, "a": 1, "b": 9}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("b") == [9]
    assert tokenizer.decode([1, 5, 9]) == "a b"
    assert TokenDocuments.from_texts(["b"], tokenizer).tokens.tolist() == [0, 9, 0]


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"</s>": 0, "?": 1, "a": 2, "b": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    return backend


def unigram():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "</>sab▁")]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>", "«é»"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the memory learns 日本語 日本 é à la carte"] * 9, trainer)
    return backend


def byte_level_with_prefix():
    """Byte level as well, but its tokens stand for a blank that the text does not hold."""
    from tokenizers import pre_tokenizers

    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


BACKENDS = [word_level, unigram, byte_level, byte_level_with_prefix]


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda make: make.__name__)
def tokenizer(request, tmp_path_factory):
    pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp(request.param.__name__) / "tokenizer.json"
    request.param().save(str(file))
    return load_tokenizer(file)


@pytest.mark.parametrize("text", ["a </s> b", "</s>", "a</s></s>b a"])
def test_text_that_spells_the_separator_stays_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids and tokenizer.separator_id not in ids
    assert tokenizer.encode_array(text).tolist() == ids
    documents = TokenDocuments.from_texts([text, text], tokenizer)
    assert (documents.tokens == tokenizer.separator_id).sum() == 4
    assert documents.bytes == 2 * (len(text) + 1)
    if "?" not in tokenizer.decode(ids):  # the word list has no characters to spell it with
        assert tokenizer.decode(ids).strip() == text


def test_text_that_spells_another_special_token_stays_text(tmp_path):
    pytest.importorskip("tokenizers")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    special = tokenizer.encode("«é»")
    assert len(special) > 1 and tokenizer.decode(special) == "«é»"


def test_unknown_words_are_not_taken_for_special_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    # Nothing else can stand for the word; documents are told apart by their offsets all the same.
    documents = TokenDocuments.from_texts(["word", "a"], load_tokenizer(tmp_path))
    assert documents.tokens.tolist() == [0, 0, 0, 0, 1, 0]
    assert documents.offsets.tolist() == [0, 3, 6]
    # Nor is the token for unknown words spelled out where the vocabulary could.
    vocab = {"?!": 0, "?": 1, "!": 2, "</s>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?!"))
    backend.add_special_tokens(["?!"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("word") == [0]


@given(text=st.text(alphabet="aé日 <>/s\n\t\r😀\ud800«»", max_size=30))
def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer, text):
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert ids.tolist() == tokenizer.encode(text)
    assert len(n_bytes) == len(ids)
    assert all(n_bytes >= 0)
    assert n_bytes.sum() == (len(text.encode(errors="replace")) if len(ids) else 0)


@given(text=st.text(alphabet="aé日 <>/s\n\t\r😀«»", max_size=30))
def test_bytes_of_every_token_of_a_byte_level_vocabulary(byte_level_tokenizer, text):
    ids, n_bytes = byte_level_tokenizer.encode_with_bytes(text)
    for end in range(len(ids) + 1):
        read = text.encode()[: n_bytes[:end].sum()].decode(errors="replace")
        assert byte_level_tokenizer.decode(ids[:end]) == read


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory):
    pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    byte_level().save(str(file))
    return load_tokenizer(file)


def test_bytes_where_blanks_give_no_token(tmp_path):
    pytest.importorskip("tokenizers")
    word_level().save(str(tmp_path / "tokenizer.json"))
    ids, n_bytes = load_tokenizer(tmp_path).encode_with_bytes("a   é\n</s> b \n")
    assert ids.tolist() == [2, 1, 1, 1, 1, 1, 3]
    assert n_bytes.tolist() == [1, 5, 5, 0, 0, 0, 4]


def test_bytes_where_the_librarys_offsets_go_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    backend = byte_level_with_prefix()
    backend.normalizer = tokenizers.normalizers.BertNormalizer()  # puts blanks around every Chinese character
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    offsets = backend.encode("日 \uac01").offsets
    assert any(later[1] < earlier[1] for earlier, later in pairwise(offsets))
    n_bytes = load_tokenizer(tmp_path).encode_with_bytes("日 \uac01")[1]
    assert n_bytes.min() == 0 and n_bytes.sum() == 7


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
