"""Tokenised documents and the windows that training and evaluation cut out of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenDocuments:
    """Documents as one flat array of token ids, each document followed by the separator.

    Attributes:
        tokens: uint16 ``[n]``, int32 for vocabularies above 65,536.
        offsets: int64 ``[documents + 1]``; ``tokens[offsets[i]:offsets[i + 1]]`` is document i with its separator.
        separator_id: the id that ends every document.
        bytes: length of all documents in UTF-8, each separator counted as one byte.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    separator_id: int
    bytes: int

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: Tokenizer) -> TokenDocuments:
        """Tokenise ``texts``; empty ones are left out.

        Raises:
            ValueError: no text is left.
        """
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        separator = np.array([tokenizer.separator_id], dtype=dtype)
        pieces = [tokenizer.encode_array(text).astype(dtype, copy=False) for text in texts]
        pieces = [np.concatenate((piece, separator)) for piece in pieces if len(piece)]
        if not pieces:
            raise ValueError("texts: no document holds any text")
        n_bytes = sum(len(text.encode("utf-8", errors="replace")) for text in texts) + len(pieces)
        offsets = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        return cls(np.concatenate(pieces), offsets, tokenizer.separator_id, n_bytes)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes that a token stands for; 1 with the byte tokenizer."""
        return self.bytes / len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document without its separator."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]

    def window(self, start: int, length: int) -> Tensor:
        """``length`` tokens from position ``start`` of the flat array on, which goes round at its end; int64."""
        positions = np.arange(start, start + length)
        return torch.from_numpy(self.tokens.take(positions, mode="wrap").astype(np.int64))


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Random training windows.

    A document that, with its separator, is at least as long as the window gives a window of its own from anywhere
    inside it. A shorter one is taken whole and joined by the documents that follow it in the corpus, a separator after
    each, until the window is full. Documents are drawn in proportion to their length, with replacement.

    A window is a pure function of ``(seed, index)``: worker processes, batch sizes and a resumed run change nothing.

    Args:
        documents: what to cut from.
        length: tokens a window, at least 2 (one to read, one to predict).
        seed: any integer; other seeds give other windows.
        n_windows: length of the data set. Default: as many windows as the tokens fill once. A longer run should ask for
            all windows that it will see, since a second pass over the same indices repeats the same windows.

    Each item is ``{"input_ids", "labels"}``, int64 ``[length]``, labels equal to the ids: the model shifts them.

    Raises:
        ValueError: ``length`` or ``n_windows`` is out of range.
    """

    def __init__(self, documents: TokenDocuments, length: int, seed: int = 0, n_windows: int | None = None):
        _check_length(length)
        if n_windows is not None and n_windows < 1:
            raise ValueError(f"n_windows: {n_windows} must be at least 1")
        self.documents = documents
        self.length = length
        self.seed = seed
        self.n_windows = n_windows or max(1, len(documents.tokens) // length)

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.n_windows:
            raise IndexError(f"index: {index} is outside [0, {self.n_windows})")
        return _example(self.documents.window(self.start(index), self.length))

    def start(self, index: int) -> int:
        """First position of window ``index`` in the documents' flat array."""
        where, offset = _draw(f"{self.seed}:{index}")
        offsets = self.documents.offsets
        document = int(np.searchsorted(offsets, where % len(self.documents.tokens), side="right")) - 1
        begin, end = int(offsets[document]), int(offsets[document + 1])
        return begin + offset % max(1, end - begin - self.length + 1)


class StreamDataset(WindowDataset):
    """Training windows that go on where others stopped: many streams, each through consecutive windows of a document.

    Window ``index`` belongs to stream ``index % streams``. A stream starts afresh, at a place drawn as `WindowDataset`
    draws its windows, where its document has no whole window left, and by chance at a share ``fresh`` of the others.

    A window is a pure function of ``(seed, index)`` here as well: a resumed run reads what it would have read.

    Args:
        documents, length, seed, n_windows: as `WindowDataset`.
        streams: how many are read in turn, at least 1.
        fresh: share of windows that start afresh though their document goes on, in [0, 1].

    Each item is ``{"input_ids", "labels", "fresh"}``; ``fresh``, a bool, says that the state of the window's stream
    must be reset before it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        length: int,
        streams: int,
        fresh: float,
        seed: int = 0,
        n_windows: int | None = None,
    ):
        super().__init__(documents, length, seed, n_windows)
        if streams < 1:
            raise ValueError(f"streams: {streams} must be at least 1")
        if not 0 <= fresh <= 1:
            raise ValueError(f"fresh: {fresh} must be between 0 and 1")
        self.streams = streams
        self.fresh = fresh
        self._reached: dict[int, tuple[int, int, bool]] = {}  # stream: the window asked for last, and its place

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "fresh": torch.tensor(self.place(index)[1])}

    def start(self, index: int) -> int:
        """First position of window ``index`` in the documents' flat array."""
        return self.place(index)[0]

    def place(self, index: int) -> tuple[int, bool]:
        """First position of window ``index``, and whether its stream starts afresh there."""
        stream = index % self.streams
        at, start, fresh = self._reached.get(stream, (index + 1, 0, True))
        if at > index:
            at, start, fresh = stream, super().start(stream), True
        while at < index:
            at += self.streams
            document = int(np.searchsorted(self.documents.offsets, start, side="right"))
            fresh = (
                start + 2 * self.length > self.documents.offsets[document]
                or _draw(f"{self.seed}:{at}:fresh")[0] < self.fresh * 2**64
            )
            start = super().start(at) if fresh else start + self.length
        self._reached[stream] = at, start, fresh
        return start, fresh


class EvaluationWindows(Dataset[dict[str, Tensor]]):
    """Fixed windows at given positions; see :func:`evaluation_windows`."""

    def __init__(self, documents: TokenDocuments, length: int, starts: Sequence[int]):
        self.documents = documents
        self.length = length
        self.starts = list(starts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _example(self.documents.window(self.starts[index], self.length))


def evaluation_windows(documents: TokenDocuments, length: int, n: int | None = None) -> EvaluationWindows:
    """Windows for evaluation: contiguous, never overlapping, the same at every call.

    A document that, with its separator, is at least as long as the window is cut from its start on; a remainder that
    fills no window is left out. A shorter one begins a window that the documents after it fill up.

    Args:
        documents: what to cut from.
        length: tokens a window, at least 2.
        n: keep this many, evenly spread over the whole corpus; default all, also when there are fewer.

    Returns:
        A data set of ``{"input_ids", "labels"}``, int64 ``[length]``, labels equal to the ids.

    Raises:
        ValueError: ``length`` or ``n`` is out of range, or the documents together are shorter than one window.
    """
    _check_length(length)
    if n is not None and n < 1:
        raise ValueError(f"n: {n} must be at least 1")
    starts: list[int] = []
    covered = 0
    for begin, end in zip(documents.offsets[:-1].tolist(), documents.offsets[1:].tolist()):
        position = max(begin, covered)
        while position + length <= end:
            starts.append(position)
            position = covered = position + length
        if position == begin and begin + length <= len(documents.tokens):
            starts.append(begin)
            covered = begin + length
    if not starts:
        raise ValueError(f"length: {length} is more than the {len(documents.tokens)} tokens of all documents together")
    if n is not None and n < len(starts):
        starts = [starts[i * len(starts) // n] for i in range(n)]
    return EvaluationWindows(documents, length, starts)


def bits_per_byte(nats_per_token: float, tokens: int, bytes: int) -> float:
    """Cross entropy in bits for each byte of text, which compares models across tokenizers.

    Args:
        nats_per_token: mean loss of a token.
        tokens: number of tokens it was averaged over.
        bytes: number of bytes these tokens stand for (``tokens * documents.bytes_per_token``).

    Raises:
        ValueError: ``bytes`` is not positive.
    """
    if bytes <= 0:
        raise ValueError(f"bytes: {bytes} must be positive")
    return nats_per_token * tokens / (bytes * math.log(2))


def _draw(key: str) -> tuple[int, int]:
    """Two numbers below 2^64. A hash, not a random generator: the same under every version of numpy and torch."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"length: {length} must be at least 2, one token to read and one to predict")


def _example(input_ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": input_ids, "labels": input_ids.clone()}
