"""The windows that training and evaluation cut out of tokenised documents.

An item is a dictionary of tensors, int64 ``[length]`` each unless said otherwise:

* ``input_ids``,
* ``labels``: the ids, -100 at the first token of a document, which nothing before it tells; the model shifts them,
* ``document_ids``: constant inside a document, another number from the first token of the next one on, so that the
  model can start every document afresh inside a window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data.documents import TokenDocuments

IGNORED = -100


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Random training windows.

    A window is centred on a token drawn uniformly from the corpus, and moved inside that token's document where it
    would reach over one of its ends: of the windows drawn from a document of n tokens, about ``length / (2 n)`` show
    its beginning. A document that, with its separators, is shorter than the window is taken from its beginning and
    joined by the documents that follow it in the corpus until the window is full.

    A window is a pure function of ``(seed, index)``: worker processes, batch sizes and a resumed run change nothing.

    Args:
        documents: what to cut from.
        length: tokens a window, at least 2 (one to read, one to predict).
        seed: any integer; other seeds give other windows.
        n_windows: length of the data set. Default: as many windows as the tokens fill once. A longer run should ask for
            all windows that it will see, since a second pass over the same indices repeats the same windows.

    Each item is ``{"input_ids", "labels", "document_ids"}``, as at the head of this file.

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
        start = self.start(index)
        return _example(self.documents, [(start, start + self.length)])

    def start(self, index: int) -> int:
        """First position of window ``index`` in the documents' flat array."""
        offsets = self.documents.offsets
        centre = _draw(f"{self.seed}:{index}") % len(self.documents.tokens)
        document = int(np.searchsorted(offsets, centre, side="right")) - 1
        begin, end = int(offsets[document]), int(offsets[document + 1])
        return max(begin, min(centre - self.length // 2, end - self.length))


class StreamDataset(WindowDataset):
    """Training windows that go on where others stopped: many streams, each through consecutive windows of a document.

    Window ``index`` belongs to stream ``index % streams``. A stream starts afresh, at a place drawn as `WindowDataset`
    draws its windows, where its document has no whole window left, and by chance at a share ``fresh`` of the others.

    A window is a pure function of ``(seed, index)`` here as well: a resumed run reads what it would have read.

    Args:
        documents, length, seed, n_windows: as `WindowDataset`.
        streams: how many are read in turn, at least 1.
        fresh: share of windows that start afresh though their document goes on, in [0, 1].

    Each item is ``{"input_ids", "labels", "document_ids", "fresh"}``; ``fresh``, a bool, says that the state of the
    window's stream must be reset before it. A window that is not fresh lies inside one document.

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
                or _draw(f"{self.seed}:{at}:fresh") < self.fresh * 2**64
            )
            start = super().start(at) if fresh else start + self.length
        self._reached[stream] = at, start, fresh
        return start, fresh


class EvaluationWindows(Dataset[dict[str, Tensor]]):
    """Fixed windows; see :func:`evaluation_windows`.

    Attributes:
        spans: for each window the pieces that fill it, ``(start, stop)`` in the documents' flat array.
    """

    def __init__(self, documents: TokenDocuments, length: int, spans: Sequence[Sequence[tuple[int, int]]]):
        self.documents = documents
        self.length = length
        self.spans = spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spans = self.spans[index]
        n_bytes = sum(int(self.documents.byte_lengths[start + 1 : stop].sum()) for start, stop in spans)
        return {**_example(self.documents, spans), "bytes": torch.tensor(n_bytes)}


def evaluation_windows(
    documents: TokenDocuments, length: int, n: int | None = None, *, whole: bool = False
) -> EvaluationWindows:
    """Windows for evaluation that score every token once; the same at every call.

    A document longer than a window is cut into consecutive pieces from its start on, each read afresh; the last token
    of a piece is the first of the next one, read there and not scored again. What is left over, and shorter documents,
    are packed in their order into windows of several documents; a piece that the end of a window cuts goes on afresh in
    the next one. All but what is left for a last window that is not full is scored: every text token and the end
    of every document, never the separator before it.

    Args:
        documents: what to cut from.
        length: tokens a window, at least 2.
        n: keep this many, evenly spread over the whole corpus; default all, also when there are fewer.
        whole: only windows that lie inside one document, such as can be read as one stream; not every token is scored.

    Returns:
        A data set of ``{"input_ids", "labels", "document_ids", "bytes"}``, as at the head of this file; ``bytes``, an
        int64 scalar, is the bytes of text that the window's targets stand for, the end of a document counted as one.

    Raises:
        ValueError: ``length`` or ``n`` is out of range, or the documents together (if ``whole``, each of them) are
            shorter than one window.
    """
    _check_length(length)
    if n is not None and n < 1:
        raise ValueError(f"n: {n} must be at least 1")
    windows = [w for w in _pack(documents.offsets.tolist(), length) if len(w) == 1 or not whole]
    if not windows:
        held = "the longest document has" if whole else f"the {len(documents.tokens)} tokens of all documents together"
        raise ValueError(f"length: {length} is more than {held}")
    if n is not None and n < len(windows):
        windows = [windows[i * len(windows) // n] for i in range(n)]
    return EvaluationWindows(documents, length, windows)


def _pack(offsets: Sequence[int], length: int) -> Iterator[list[tuple[int, int]]]:
    """The pieces of every full window, in the order in which the windows fill."""
    shared: list[tuple[int, int]] = []
    room = length
    for at, end in pairwise(offsets):
        while at + length <= end:
            yield [(at, at + length)]
            at += length - 1
        while at + 1 < end:
            taken = min(room, end - at)
            shared.append((at, at + taken))
            at += taken - 1
            room -= taken
            if not room:
                yield shared
                shared, room = [], length


def bits_per_byte(nats_per_token: float, tokens: int, bytes: int) -> float:
    """Cross entropy in bits for each byte of text, which compares models across tokenizers.

    Args:
        nats_per_token: mean loss of a token.
        tokens: number of tokens it was averaged over.
        bytes: number of bytes these tokens stand for: the sum of the evaluation windows' ``bytes``.

    Raises:
        ValueError: ``bytes`` is not positive.
    """
    if bytes <= 0:
        raise ValueError(f"bytes: {bytes} must be positive")
    return nats_per_token * tokens / (bytes * math.log(2))


def _draw(key: str) -> int:
    """A number below 2^64. A hash, not a random generator: the same under every version of numpy and torch."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _check_length(length: int) -> None:
    if not isinstance(length, int) or length < 2:
        raise ValueError(f"length: {length!r} must be an integer of at least 2, one token to read and one to predict")


def _example(documents: TokenDocuments, spans: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The item that pieces ``(start, stop)`` of the flat array make up."""
    input_ids = torch.cat([documents.window(start, stop - start) for start, stop in spans])
    document_ids = torch.cat([documents.document_ids(start, stop - start) for start, stop in spans])
    labels = input_ids.clone()
    labels[1:][document_ids[1:] != document_ids[:-1]] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}
