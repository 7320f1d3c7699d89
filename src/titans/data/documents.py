"""Tokenised documents in one flat array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titans.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenDocuments:
    """Documents as one flat array of token ids, each one between two separators of its own.

    A document reads separator, text, separator. The first separator is what a stream starts from, so that the first
    token of the text has something to be predicted from; it is never predicted itself. The last one is the end of the
    document, which is predicted like any token.

    Where a document begins is known from ``offsets`` alone. A text that spells the separator and that the tokenizer has
    no other ids for (a NUL with bytes) holds the separator's id inside; nothing takes it for a boundary.

    Attributes:
        tokens: uint16 ``[n]``, int32 for vocabularies above 65,536.
        offsets: int64 ``[documents + 1]``; ``tokens[offsets[i]:offsets[i + 1]]`` is document i with its separators.
        separator_id: the id before and after every document.
        byte_lengths: unsigned integers ``[n]``, the bytes of UTF-8 that each token stands for, so that the sum over any
            scored targets is exact (see `Tokenizer.encode_with_bytes`): 0 for the separator before a document, which
            is never a target, and 1 for the one that ends it, as if a line end stood there.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    separator_id: int
    byte_lengths: np.ndarray

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Tokenizer) -> TokenDocuments:
        """Tokenise ``texts``, which are read once and in order; those that give no token are left out.

        Raises:
            ValueError: no text is left, ``texts`` is a single string, or an id does not lie in 0..``vocab_size`` - 1.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts: {texts[:20]!r} is a single string, expected a list of documents")
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        separator = np.array([tokenizer.separator_id], dtype=dtype)
        before, after = np.array([0], dtype=np.uint8), np.array([1], dtype=np.uint8)
        pieces, lengths = [], []
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"texts: must be strings, got {type(text).__name__}")
            ids, n_bytes = tokenizer.encode_with_bytes(text)
            if not len(ids):
                continue
            _check_ids(ids, n_bytes, tokenizer.vocab_size)
            pieces.append(np.concatenate((separator, ids.astype(dtype, copy=False), separator)))
            n_bytes = n_bytes.astype(np.min_scalar_type(n_bytes.max()), copy=False)
            lengths.append(np.concatenate((before, n_bytes, after)))
        if not pieces:
            raise ValueError("texts: no document holds any text")
        offsets = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        return cls(np.concatenate(pieces), offsets, tokenizer.separator_id, np.concatenate(lengths))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and of where documents begin; the same corpus under the same tokenizer has the same."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Length of all documents in UTF-8, one byte for the end of each included."""
        return int(self.byte_lengths.sum())

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes that a target stands for, for display; 1 with the byte tokenizer."""
        return self.bytes / (len(self.tokens) - len(self))

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document without its separators."""
        return self.tokens[self.offsets[index] + 1 : self.offsets[index + 1] - 1]

    def window(self, start: int, length: int) -> Tensor:
        """``length`` tokens from position ``start`` of the flat array on, which goes round at its end; int64."""
        positions = np.arange(start, start + length)
        return torch.from_numpy(self.tokens.take(positions, mode="wrap").astype(np.int64))

    def document_ids(self, start: int, length: int) -> Tensor:
        """Which document each token of ``window(start, length)`` is from, int64 ``[length]``.

        The number rises by one at the first token of every document, also where the flat array goes round.
        """
        rounds, positions = np.divmod(np.arange(start, start + length), len(self.tokens))
        ids = np.searchsorted(self.offsets, positions, side="right") - 1 + rounds * len(self)
        return torch.from_numpy(ids.astype(np.int64))


def _check_ids(ids: np.ndarray, n_bytes: np.ndarray, vocab_size: int) -> None:
    """What a tokenizer gives is cast afterwards, and a cast says nothing of what it changes."""
    for name, values in (("ids", ids), ("bytes", n_bytes)):
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.shape != (len(ids),):
            told = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
            raise ValueError(f"tokenizer: {name} must be an array of integers [{len(ids)}], got {told}")
    for wrong in (ids.max(), ids.min()):
        if not 0 <= wrong < vocab_size:
            raise ValueError(f"tokenizer: gives id {wrong}, but its vocab_size is {vocab_size}")
    if n_bytes.min() < 0:
        raise ValueError(f"tokenizer: a token cannot stand for {n_bytes.min()} bytes")
