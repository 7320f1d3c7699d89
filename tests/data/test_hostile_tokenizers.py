"""Tokenizers that give what no id is: named, never cast."""

import numpy as np
import pytest

from titans.data import HuggingFaceTokenizer, TokenDocuments


class Gives:
    vocab_size, separator_id = 256, 0

    def __init__(self, ids, n_bytes=None):
        self.ids, self.n_bytes = ids, np.ones(len(ids), dtype=np.int64) if n_bytes is None else n_bytes

    def encode_with_bytes(self, text):
        return self.ids, self.n_bytes


@pytest.mark.parametrize(
    "ids, n_bytes, named",
    [
        (np.array([1, -1]), None, "gives id -1, but its vocab_size is 256"),
        (np.array([1, 256]), None, "gives id 256, but its vocab_size is 256"),
        (np.array([0.5, 1.0]), None, r"ids must be an array of integers \[2\], got float64 \[2\]"),
        (np.array([True, False]), None, r"ids must be an array of integers \[2\], got bool"),
        ([1, 2], None, "ids must be an array of integers"),
        (np.array([[1, 2]]), None, r"ids must be an array of integers \[1\], got int64 \[1, 2\]"),
        (np.array([1, 2]), np.array([1.0, 1.0]), "bytes must be an array of integers"),
        (np.array([1, 2]), np.array([1]), r"bytes must be an array of integers \[2\], got int64 \[1\]"),
        (np.array([1, 2]), np.array([3, -1]), "cannot stand for -1 bytes"),
    ],
)
def test_what_is_no_id_is_named(ids, n_bytes, named):
    with pytest.raises(ValueError, match=f"tokenizer: .*{named}|tokenizer: {named}"):
        TokenDocuments.from_texts(["a text"], Gives(ids, n_bytes))


def test_a_word_that_a_tokenizer_cannot_say_is_named(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a a") == [0, 0]
    for read in (tokenizer.encode, tokenizer.encode_with_bytes, lambda t: TokenDocuments.from_texts([t], tokenizer)):
        with pytest.raises(ValueError, match=r"tokenizer: .*tokenizer\.json has no tokens for 'a zebra'"):
            read("a zebra")
