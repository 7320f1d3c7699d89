"""The corpora that have a name. A new one is a function in a file of this package, marked with its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Documents = Callable[[str, "str | Path | None"], "list[str]"]
CORPORA: dict[str, Documents] = {}


def corpus(name: str) -> Callable[[Documents], Documents]:
    """Make ``load_documents(name)`` call the function with a split ("train", "validation" or "test") and ``data_dir``.

    It returns the split's documents in a fixed order; no two splits may share one. Where it has no such split it raises
    a ValueError, where the corpus is not on this machine a FileNotFoundError that says which file to put where.

    Raises:
        ValueError: the name is taken.
    """

    def register(read: Documents) -> Documents:
        if name in CORPORA:
            raise ValueError(f"corpus {name!r} is taken by {CORPORA[name].__qualname__}: choose another name")
        CORPORA[name] = read
        return read

    return register
