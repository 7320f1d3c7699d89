"""Token ids into text as they come, never showing half a character."""

import codecs
import math
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """Text of a growing list of tokens, piece by piece.

    Byte tokens go through UTF-8's incremental decoder. For other tokenizers the text of a token depends on the ones
    before it (spaces, characters split over tokens), so each piece is the difference between two decodings of the last
    few tokens, held back while it ends in an incomplete character.

    Args:
        tokenizer: anything with ``decode(ids) -> str``.
        is_bytes: whether its ids are the 256 bytes.
    """

    LONGEST_CHARACTER = 8  # tokens; a longer run of undecodable tokens is not a character and is shown as it is

    def __init__(self, tokenizer: Decoder, is_bytes: bool):
        self._tokenizer, self._known = tokenizer, getattr(tokenizer, "vocab_size", math.inf)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if is_bytes else None
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        if self._bytes is not None:
            # A model may know more ids than there are bytes: these are no text.
            return self._bytes.decode(bytes([token])) if token < 256 else self.finish() + "\ufffd"
        if token >= self._known:
            return self.finish() + "\ufffd"
        self._pending.append(token)
        text = self._difference()
        if text.endswith("\ufffd") and len(self._pending) < self.LONGEST_CHARACTER:
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        text = self._difference()
        self._shown, self._pending = [], []
        return text

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._pending)[len(before) :]
