"""Text to token ids and back: bytes by default, any Hugging Face tokenizer from a local file or folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
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
        """The id that ends every document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without any special token added."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as a one-dimensional integer array, for texts of many megabytes."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; never fails on ids in range."""
        ...


class ByteTokenizer:
    """The 256 byte values of UTF-8 as tokens.

    The separator is byte 0 (NUL), which text files do not hold: it stands between documents and ends each one.
    """

    vocab_size = 256
    separator_id = 0

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of ``text``; half surrogate pairs, which UTF-8 cannot hold, become ``?``."""
        return list(text.encode("utf-8", errors="replace"))

    def encode_array(self, text: str) -> np.ndarray:
        """UTF-8 bytes of ``text``, uint8 ``[n]``."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

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

    Args:
        path: a ``tokenizer.json`` file, or a folder with one or with any form that ``AutoTokenizer`` can convert.
        separator: the token that ends a document. Default: the end-of-text token that the files beside the tokenizer
            name, else the first known one in the vocabulary (``<|endoftext|>``, ``</s>``, ...).

    Raises:
        ValueError: ``path`` is no tokenizer, or it has no such separator.
        ImportError: the ``train`` extra, which brings the tokenizers library, is not installed.
    """

    def __init__(self, path: str | Path, separator: str | None = None):
        self.path = Path(path)
        self._backend, declared = _load_backend(self.path)
        candidates = [separator] if separator is not None else [*declared, *KNOWN_END_TOKENS]
        found = (self._backend.token_to_id(token) for token in candidates)
        separator_id = next((i for i in found if i is not None), None)
        if separator_id is None:
            asked = repr(separator) if separator is not None else "an end-of-text token"
            raise ValueError(
                f"separator: {asked} is not in the vocabulary of {self.path}; pass separator=<a token of it>"
            )
        self.separator_id = separator_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; begin- and end-of-text tokens are not added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int32 ``[n]``."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens written out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the separator's name; ``load_tokenizer(folder)`` then gives this tokenizer."""
        target = Path(folder)
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
    if not Path(name_or_path).exists():
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
    except ImportError:
        raise _missing_library(path, "transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tokenizer: {path} holds no tokenizer that transformers can read: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer: {path} has no fast form; save it with a tokenizer.json first")
    return backend, [tokenizer.eos_token] if tokenizer.eos_token else []


def _missing_library(path: Path, library: str) -> ImportError:
    return ImportError(f"tokenizer: {path} needs the {library} library; pip install 'titans-miras[train]'")


def _declared_end_tokens(folder: Path) -> list[str]:
    """``eos_token`` as the usual files beside a ``tokenizer.json`` give it: a string, or a mapping with ``content``."""
    declared = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.exists():
            continue
        token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            declared.append(token)
    return declared
