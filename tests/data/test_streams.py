"""Inputs in blocks give the ids of whole documents, whatever they are cut into."""

import io
import json
import os
import sys

import numpy as np
import pytest

from titans.data import ByteTokenizer, HuggingFaceTokenizer, load_documents, streams
from titans.data.streams import TextInput, token_blocks

TEXT = "Naïve café — the quick brown fox, 你好 🦊; don't  stop\n\n\tdef f(x):\n        return x ** 2\n" * 40


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A tokenizer that merges bytes, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return HuggingFaceTokenizer(path)


def ids_of(documents, tokenizer):
    blocks = list(token_blocks(documents, tokenizer))
    return np.concatenate(blocks).tolist() if blocks else []


@pytest.mark.parametrize("block", [64, 100, 1000])
def test_ids_are_those_of_the_whole_document(merging, monkeypatch, block):
    monkeypatch.setattr(streams, "BLOCK", block)
    monkeypatch.setattr(streams, "AROUND", 40)
    for tokenizer in (merging, ByteTokenizer()):
        expected = [tokenizer.separator_id, *tokenizer.encode(TEXT)]
        for step in (1, 7, 999, len(TEXT)):
            pieces = (TEXT[at : at + step] for at in range(0, len(TEXT), step))
            assert ids_of([pieces], tokenizer) == expected


def test_a_run_longer_than_a_block_loses_nothing(merging, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 50)
    monkeypatch.setattr(streams, "AROUND", 10)
    text = "a" * 333 + "é" * 333
    assert merging.decode(ids_of([[text]], merging)[1:]).lstrip().replace(" ", "") == text


def test_half_a_character_is_a_question_mark_as_in_training(merging):
    for tokenizer in (merging, ByteTokenizer()):
        assert ids_of([["a\ud800b", "c\udcff"]], tokenizer) == [tokenizer.separator_id, *tokenizer.encode("a?bc?")]


def test_documents_begin_with_a_separator_and_empty_ones_are_none():
    assert ids_of([["a", "b"], ["", ""], [], ["c"]], ByteTokenizer()) == [0, 97, 98, 0, 99]


def test_files_are_read_as_the_corpora_read_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [TEXT, "second\r\n", "third \x00"]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps({"text": t, "n": 1}) for t in texts))
    parquet.write_table(pyarrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        source = TextInput(str(tmp_path / name))
        found = ["".join(document) for document in source.documents()]
        if name == "a.txt":
            train, held_out = (load_documents(tmp_path / name, split)[0] for split in ("train", "validation"))
            assert found == [train + held_out]
        else:
            assert found == texts
        assert source.bytes == source.size == (tmp_path / name).stat().st_size
        import hashlib

        assert source.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_standard_input_is_text(monkeypatch):
    read, write = os.pipe()
    os.write(write, TEXT.encode())
    os.close(write)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(read, "rb")))
    source = TextInput("-")
    assert "".join(next(source.documents())) == TEXT
    assert (source.size, source.bytes, source.shown_name) == (None, len(TEXT.encode()), "standard input")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF\x00\x01", "a.pdf is no text"),
        ("a.md", b"caf\xe9", "a.md: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}', "line 2 has no text"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.parquet", b"PAR1", "not a readable .parquet"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ids_of(TextInput(str(tmp_path / name)).documents(), ByteTokenizer())


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        TextInput(str(tmp_path / "none"))
    with pytest.raises(IsADirectoryError, match="name its files"):
        TextInput(str(tmp_path))
