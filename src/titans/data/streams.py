"""Inputs of any length as token ids, block by block: the memory needed does not depend on how long they are."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from titans.data.corpora import SUFFIXES, not_utf8, read_jsonl, read_parquet, suffix_of
from titans.data.tokenizers import ByteTokenizer, Tokenizer, byte_positions, whole_characters
from titans.names import path_of

STDIN = "-"
BLOCK = 2**16  # characters that are tokenised at once
AROUND = 2**10  # characters beside a block that its tokens may depend on


class TextInput:
    """One input: a ``.txt``, ``.jsonl`` or ``.parquet`` file as the corpora read them, any other text, or ``-``. All
    must be UTF-8.

    Args:
        name: a path, or ``-`` for standard input, which is text.
        text_field: the key or column that holds the text of a ``.jsonl`` or ``.parquet`` row.

    Attributes:
        size: bytes, None where nobody can know before the end.
        bytes: read so far (of a ``.parquet`` file an estimate).

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
    """

    def __init__(self, name: str, text_field: str = "text"):
        self.name, self.text_field, self.bytes = name, text_field, 0
        self.path = None if name == STDIN else path_of("input", name)
        self.size: int | None = None
        self._digest = hashlib.sha256()
        if self.path is None:
            return
        if self.path.is_dir():
            raise IsADirectoryError(None, "is a folder; name its files", str(self.path))
        if not self.path.exists():
            raise FileNotFoundError(None, "No such file", str(self.path))
        self.size = self.path.stat().st_size if self.path.is_file() else None

    @property
    def shown_name(self) -> str:
        """What provenance calls it: no folder of the machine."""
        return "standard input" if self.path is None else self.path.name

    @property
    def sha256(self) -> str:
        """Hash of the bytes read."""
        return self._digest.hexdigest()

    def documents(self) -> Iterator[Iterator[str]]:
        """The documents, each as texts to be put together.

        Raises:
            ValueError: the content is not what the name says.
            ImportError: a ``.parquet`` file, and pyarrow is not installed.
        """
        suffix = "" if self.path is None else suffix_of(self.path)
        if suffix == ".parquet":
            yield from self._rows_of_parquet()
            return
        with self._open() as file:
            if suffix == ".jsonl":
                assert self.path is not None
                yield from (iter((text,)) for text in read_jsonl(self.path, self.text_field, file))
            else:
                yield self._text(file, binary=suffix in SUFFIXES)

    def _rows_of_parquet(self) -> Iterator[Iterator[str]]:
        assert self.path is not None and self.size is not None
        for text, share in read_parquet(self.path, self.text_field):
            self.bytes = round(share * self.size)
            yield iter((text,))
        self.bytes = self.size
        with self.path.open("rb") as file:
            while block := file.read(2**20):
                self._digest.update(block)

    def _text(self, file: BinaryIO, binary: bool) -> Iterator[str]:
        """A whole file's text.

        Raises:
            ValueError: bytes that are no UTF-8, or, unless the file may be ``binary``, a NUL.
        """
        where = self.shown_name if self.path is None else str(self.path)
        decoder = codecs.getincrementaldecoder("utf-8")()
        begin, first = 0, True  # of what is decoded next
        while True:
            content = file.read(BLOCK)
            if first:
                if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{where} is UTF-16, texts must be UTF-8")
                if content.startswith(codecs.BOM_UTF8):
                    content, begin = content.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
                first = False
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: {not_utf8(begin - held + error.start)}") from error
            if not binary and "\0" in text:
                raise ValueError(
                    f"{where} is no text, it holds NULs; what is given is read as it stands, .jsonl and "
                    ".parquet by rows"
                )
            begin += len(content)
            if text:
                yield text
            if not content:
                return

    def _open(self) -> BinaryIO:
        if self.path is not None:
            return io.BufferedReader(_Counted(self.path.open("rb", buffering=0), self), BLOCK)
        if sys.stdin is None or sys.stdin.closed:
            raise ValueError("standard input is closed")
        return io.BufferedReader(_Counted(os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0), self), BLOCK)

    def take(self, content: memoryview) -> None:
        """Note bytes that were read."""
        self.bytes += len(content)
        self._digest.update(content)


class _Counted(io.RawIOBase):
    """A raw file that tells its input what was read."""

    def __init__(self, file: io.RawIOBase | io.FileIO, owner: TextInput):
        self._file, self._owner = file, owner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        n = self._file.readinto(buffer)
        self._owner.take(memoryview(buffer)[: n or 0])
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def token_blocks(documents: Iterable[Iterable[str]], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of documents, each behind a separator, in blocks of any length; none without text.

    No separator follows the last document, so that whatever is read next goes on behind its text. The ids are those of
    whole documents, unless the tokenizer's choice depends on what is more than 1,024 characters away.
    """
    separator = np.array([tokenizer.separator_id])
    for document in documents:
        begun = False
        for ids in _document_ids(_blocks(document), tokenizer):
            if len(ids):
                yield ids if begun else np.concatenate((separator, ids))
                begun = True


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """The same text in blocks of one length, whatever it came in; halves of characters as tokenizers take them."""
    held: list[str] = []
    length = 0
    for text in map(whole_characters, texts):
        held.append(text)
        length += len(text)
        if length >= BLOCK:
            joined = "".join(held)
            whole = length // BLOCK * BLOCK
            yield from (joined[at : at + BLOCK] for at in range(0, whole, BLOCK))
            held, length = [joined[whole:]], length - whole
    if length:
        yield "".join(held)


def _document_ids(blocks: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    if isinstance(tokenizer, ByteTokenizer):
        yield from map(tokenizer.encode_array, blocks)
        return
    known, text = "", next(blocks, "")  # the end of what is done, and what is to do
    while text:
        after = next(blocks, "")
        ids, done = _settled(known, text, tokenizer, whole=not after)
        yield ids
        known, text = (known + text[:done])[-AROUND:], text[done:] + after


def _settled(known: str, text: str, tokenizer: Tokenizer, whole: bool) -> tuple[np.ndarray, int]:
    """Ids of ``text`` behind ``known``, but for its last characters, whose ids may depend on what follows; and of how
    many characters these are."""
    ids, n_bytes = tokenizer.encode_with_bytes(known + text)
    places, ends = byte_positions(known + text), np.cumsum(n_bytes, dtype=np.int64)
    begin = places[len(known)]
    first = int(np.searchsorted(ends, begin, side="right"))
    if known and (first == 0 or ends[first - 1] != begin):  # a token lies across: the border is a border for the ids
        return _settled("", text, tokenizer, whole)
    if whole:
        return ids[first:], len(text)
    characters = np.searchsorted(places, ends)
    usable = (places[characters] == ends) & (characters <= len(known) + len(text) - AROUND) & (characters > len(known))
    if not usable.any():  # one enormous token: cut it
        return tokenizer.encode_array(text), len(text)
    last = int(np.flatnonzero(usable)[-1])
    return ids[first : last + 1], int(characters[last]) - len(known)
