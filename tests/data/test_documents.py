"""The flat array of documents: its layout, boundaries and bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.data import ByteTokenizer, TokenDocuments


def documents_of(texts):
    return TokenDocuments.from_texts(texts, ByteTokenizer())


def test_every_document_lies_between_two_separators():
    documents = documents_of(["ab", "", "é"])
    assert documents.tokens.tolist() == [0, 97, 98, 0, 0, 0xC3, 0xA9, 0]
    assert documents.tokens.dtype == np.uint16
    assert documents.offsets.tolist() == [0, 4, 8]
    assert len(documents) == 2
    assert documents.document(1).tolist() == [0xC3, 0xA9]
    # The end of a document is one byte, the separator before it is never predicted and none.
    assert documents.byte_lengths.tolist() == [0, 1, 1, 1] * 2
    assert documents.bytes == 6
    assert documents.bytes_per_token == 1.0


@given(st.lists(st.text(max_size=9), min_size=1).filter(any))
def test_any_iterable_is_read_once(texts):
    expected = documents_of(texts)
    for iterable in (iter(texts), (text for text in texts), tuple(texts), dict(enumerate(texts)).values()):
        documents = documents_of(iterable)
        assert documents.tokens.tolist() == expected.tokens.tolist()
        kept = [text.encode(errors="replace") for text in texts if text]
        assert documents.bytes == sum(map(len, kept)) + len(kept)
        assert [bytes(documents.document(i).tolist()) for i in range(len(documents))] == kept


def test_a_nul_in_a_text_is_no_boundary():
    documents = documents_of(["a\0\0b", "\0"])
    assert documents.offsets.tolist() == [0, 6, 9]
    assert documents.document(0).tolist() == [97, 0, 0, 98]
    assert documents.document_ids(0, 9).tolist() == [0] * 6 + [1] * 3
    assert ByteTokenizer().decode(documents.document(0)) == "a\0\0b"


class Words(ByteTokenizer):
    vocab_size = 100_000
    separator_id = 99_999

    def encode_with_bytes(self, text):
        ids = [70_000 + len(word) for word in text.split()]
        return np.array(ids, dtype=np.int64), np.array([len(word) for word in text.split()], dtype=np.int64)


def test_large_vocabularies_and_long_tokens():
    documents = TokenDocuments.from_texts(["a word", "x" * 20_000], Words())
    assert documents.tokens.dtype == np.int32
    assert documents.tokens.tolist() == [99_999, 70_001, 70_004, 99_999, 99_999, 90_000, 99_999]
    assert documents.byte_lengths.tolist() == [0, 1, 4, 1, 0, 20_000, 1]
    assert documents.bytes_per_token == 20_007 / 5
    assert documents.window(5, 3).dtype == torch.int64
    assert documents.window(5, 3).tolist() == [90_000, 99_999, 99_999]


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="texts: no document"):
        documents_of(["", ""])
    with pytest.raises(ValueError, match="texts: 'one document' is a single string"):
        documents_of("one document")

    class Narrow(ByteTokenizer):
        vocab_size = 97

    with pytest.raises(ValueError, match="tokenizer: gives id 98, but its vocab_size is 97"):
        TokenDocuments.from_texts(["ab"], Narrow())
