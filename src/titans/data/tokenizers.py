"""Text to token ids and back: bytes by default, any Hugging Face tokenizer from a local file or folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from titans.names import check_kind, path_of

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

KNOWN_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id lies in ``[0, vocab_size)``."""
        ...

    @property
    def separator_id(self) -> int:
        """The id before and after every document. No boundary follows from the id alone: a text may hold it too."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without any special token added."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as a one-dimensional integer array, for texts of many megabytes."""
        ...

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The same ids, and the bytes of UTF-8 that each stands for, which add up to those of ``text`` (no ids: to 0).

        Where several tokens share a piece of text and the tokenizer does not say which bytes are whose, it counts with
        the first; text that gives no token (dropped blanks) counts with the next one, at the end with the last one.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; never fails on ids in range."""
        ...


class ByteTokenizer:
    """The 256 byte values of UTF-8 as tokens.

    The separator is byte 0 (NUL). A NUL in a text stays a byte 0 of that text: documents are told apart by
    `TokenDocuments.offsets` and by the ``document_ids`` of a window, never by the byte. Only generation, which ends at
    the separator, would end at such a NUL too.
    """

    vocab_size = 256
    separator_id = 0

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of ``text``; half surrogate pairs, which UTF-8 cannot hold, become ``?``."""
        check_kind("text", text, str, "a string")
        return list(text.encode("utf-8", errors="replace"))

    def encode_array(self, text: str) -> np.ndarray:
        """UTF-8 bytes of ``text``, uint8 ``[n]``."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """UTF-8 bytes of ``text`` and as many ones, uint8 ``[n]``."""
        ids = self.encode_array(text)
        return ids, np.ones_like(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of byte values; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside ``[0, 256)``.
        """
        values = [int(i) for i in ids]
        try:
            return bytes(values).decode("utf-8", errors="replace")
        except ValueError:
            wrong = next(i for i in values if not 0 <= i < self.vocab_size)
            raise ValueError(f"ids: {wrong} is not a byte, expected 0 to 255") from None


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face family, read from the local disk only.

    Texts are encoded whole and as text: truncation and padding that the file asks for are switched off, and what spells
    a special token (``</s>``) becomes ordinary pieces, not that token. Only a tokenizer that has no other ids for it
    (a word list without its characters, or one whose unknown-word token is the separator) still gives the token.

    Args:
        path: a ``tokenizer.json`` file, or a folder with one or with any form that ``AutoTokenizer`` can convert.
        separator: the token before and after every document. Default: the end-of-text token that the files beside the
            tokenizer name, else the first known one in the vocabulary (``<|endoftext|>``, ``</s>``, ...).

    Attributes:
        vocab_size: the largest id plus one, added tokens included; ids may have gaps.
        separator_id: the id of ``separator``.

    Raises:
        ValueError: ``path`` is no tokenizer, or it has no such separator.
        ImportError: the ``train`` extra, which brings the tokenizers library, is not installed.
    """

    def __init__(self, path: str | Path, separator: str | None = None):
        self.path = path_of("path", path)
        self._backend, declared = _load_backend(self.path)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        candidates = [separator] if separator is not None else [*declared, *KNOWN_END_TOKENS]
        found = (self._backend.token_to_id(token) for token in candidates)
        separator_id = next((i for i in found if i is not None), None)
        if separator_id is None:
            asked = repr(separator) if separator is not None else "an end-of-text token"
            raise ValueError(
                f"separator: {asked} is not in the vocabulary of {self.path}; pass separator=<a token of it>"
            )
        self.separator_id = separator_id
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._spelled = _spellings(self._backend, separator_id)
        self._id_bytes = _bytes_by_id(self._backend, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; begin- and end-of-text tokens are not added."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int32 ``[n]``; half surrogate pairs, which UTF-8 cannot hold, become ``?``."""
        return self._encode(whole_characters(text))[0]

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of ``text``, int32 ``[n]``, and the bytes that each stands for, int64 ``[n]``."""
        text = whole_characters(text)
        ids, encoding, places = self._encode(text)
        if self._id_bytes is not None:
            n_bytes = self._id_bytes[ids]
            if n_bytes.sum() == len(text.encode()):  # else something was added, dropped or rewritten before the bytes
                return ids, n_bytes
        ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)[places]
        ends[-1:] = len(text)  # and, before it, an end may lie a little before the last one
        return ids, np.diff(byte_positions(text)[np.maximum.accumulate(ends)], prepend=0)

    def _encode(self, text: str) -> tuple[np.ndarray, Encoding, np.ndarray]:
        """Ids, the library's own result, and the token there that each id comes from.

        Raises:
            ValueError: the vocabulary has no token for something in the text, not even one for unknown words.
        """
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception where it has no token for a text
            raise ValueError(f"tokenizer: {self.path} has no tokens for {text[:40]!r}: {error}") from error
        ids = np.array(encoding.ids, dtype=np.int32)
        pieces = np.ones_like(ids)
        special = np.flatnonzero(np.isin(ids, list(self._spelled)))
        pieces[special] = [len(self._spelled[i]) for i in ids[special].tolist()]
        places = np.repeat(np.arange(len(ids)), pieces)
        spelled = [piece for i in ids[special].tolist() for piece in self._spelled[i]]
        is_spelled = np.isin(places, special)
        ids = ids[places]
        ids[is_spelled] = spelled
        return ids, encoding, places

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens written out; ids in a gap of the vocabulary give nothing.

        Raises:
            ValueError: an id is outside ``[0, vocab_size)``.
        """
        values = [int(i) for i in ids]
        wrong = next((i for i in values if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"ids: {wrong} is not below the vocabulary of {self.vocab_size}")
        return self._backend.decode(values, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the separator's name; ``load_tokenizer(folder)`` then gives this tokenizer."""
        target = path_of("folder", folder)
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"))
        settings = {"eos_token": self._backend.id_to_token(self.separator_id)}
        (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def load_tokenizer(name_or_path: str | Path = "bytes") -> Tokenizer:
    """The tokenizer of that name or at that path.

    Args:
        name_or_path: ``"bytes"`` (default), a ``tokenizer.json`` file or a tokenizer folder.

    Raises:
        ValueError: neither of the two.
        ImportError: a file or folder is asked for and the ``train`` extra is missing.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    if not path_of("tokenizer", name_or_path).exists():
        raise ValueError(
            f"tokenizer: {str(name_or_path)!r} is neither 'bytes' nor a local tokenizer.json file or tokenizer folder"
        )
    return HuggingFaceTokenizer(name_or_path)


def _load_backend(path: Path) -> tuple[Backend, list[str]]:
    """The tokenizer at ``path`` and the end-of-text tokens that it declares."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        return _convert_folder(path)
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise _missing_library(path, "tokenizers") from None
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every unreadable file
        raise ValueError(f"tokenizer: {file} is not a readable tokenizer.json: {error}") from error
    return backend, _declared_end_tokens(file.parent)


def _convert_folder(path: Path) -> tuple[Backend, list[str]]:
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise _missing_library(path, "transformers") from None
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong we say ourselves, in one line
    try:
        # No code that lies in the folder is run, and nobody is asked whether it may.
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its files make it stumble over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"tokenizer: {path} holds no tokenizer that transformers can read: {reason}") from error
    finally:
        logging.set_verbosity(before)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer: {path} has no fast form; save it with a tokenizer.json first")
    return backend, [tokenizer.eos_token] if tokenizer.eos_token else []


def _spellings(backend: Backend, separator_id: int) -> dict[int, list[int]]:
    """Special tokens that the vocabulary may still find in a text, and the ids of their characters instead.

    ``encode_special_tokens`` keeps the library from looking for special tokens; a model that knows whole words, or all
    pieces of its list, finds those in its list all the same.
    """
    added = backend.get_added_tokens_decoder()
    ids = {separator_id, *(i for i, token in added.items() if token.special)}
    unknown = _model_ids(backend, "\U0010ffff")  # no character: what comes of it does so for any unknown text
    found = {i: [piece for c in backend.id_to_token(i) or "" for piece in _model_ids(backend, c)] for i in ids}
    return {i: pieces for i, pieces in found.items() if pieces and i not in pieces and i not in unknown}


def _model_ids(backend: Backend, characters: str) -> list[int]:
    try:
        return [token.id for token in backend.model.tokenize(characters)]
    except Exception:  # the library raises bare Exception where a model has no token for unknown text
        return []


def _bytes_by_id(backend: Backend, vocab_size: int) -> np.ndarray | None:
    """How many bytes each id stands for, int64 ``[vocab_size]``, where the vocabulary is written in bytes."""
    from tokenizers.decoders import ByteLevel

    if not isinstance(backend.decoder, ByteLevel):
        return None
    added = backend.get_added_tokens_decoder()
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        lengths[i] = len(token.encode()) if i in added else len(token)  # one letter of its alphabet a byte
    return lengths


def whole_characters(text: str) -> str:
    """The text with ``?`` for every half of a surrogate pair, which UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def byte_positions(text: str) -> np.ndarray:
    """Where in its UTF-8 each character of ``text`` begins, and its length at the end; int64 ``[characters + 1]``."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    n_bytes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(n_bytes, dtype=np.int64)))


def _missing_library(path: Path, library: str) -> ImportError:
    return ImportError(f"tokenizer: {path} needs the {library} library; pip install 'titans-miras[train]'")


def _declared_end_tokens(folder: Path) -> list[str]:
    """``eos_token`` as the usual files beside a ``tokenizer.json`` give it: a string, or a mapping with ``content``."""
    declared = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.exists():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer: {file} is not JSON: {error}") from error
        token = settings.get("eos_token") if isinstance(settings, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(settings, dict) or not isinstance(token, str | None):
            raise ValueError(f"tokenizer: {file}: expected a mapping whose eos_token is a string")
        if token:
            declared.append(token)
    return declared
