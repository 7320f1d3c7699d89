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
        ValueError: the name is taken by another function.
        TypeError: no name is given.
    """
    if not isinstance(name, str):
        raise TypeError(f'corpus needs a name, as in @corpus("notes"), got {name!r}')

    def register(read: Documents) -> Documents:
        known = CORPORA.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (read.__module__, read.__qualname__):
            raise ValueError(f"corpus {name!r} is taken by {known.__qualname__}: choose another name")
        CORPORA[name] = read
        return read

    return register
