"""What callers give: what to say of a name that nobody knows, a value of another kind, a path that is none."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class TooLong(ValueError):
    """More text than something has places for. On the command line the work has failed, not the input."""


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """``what must be one of a, b, c, got 'bb', did you mean 'b'?``"""
    names = list(known)
    return f"{what} must be one of {', '.join(names)}, got {value!r}{suggestion(value, names)}"


def suggestion(value: object, known: Iterable[str]) -> str:
    """``, did you mean 'b'?`` where a known name is spelt much like ``value``, upper and lower case alike; else
    nothing."""
    by_sound = {name.lower(): name for name in known}
    close = difflib.get_close_matches(value.lower(), by_sound, n=1) if isinstance(value, str) else []
    return f", did you mean {by_sound[close[0]]!r}?" if close else ""


def path_of(argument: str, value: object) -> Path:
    """The path that a caller gave.

    Raises:
        ValueError: it is neither a string nor a path, or empty, which is not the working directory.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise ValueError(f"{argument} must be a path, a string or an os.PathLike, got {value!r:.100}")
    if not os.fspath(value):
        raise ValueError(f"{argument}: is empty; name a file or a folder, '.' for this one")
    return Path(value)


def check_kind(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise a ValueError unless ``value`` is of this kind, said as ``what``; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ValueError(f"{name} must be {what}, got {type(value).__name__} {value!r:.60}")


def each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A mapping of JSON (``object_pairs_hook``); a ValueError where a key is given twice."""
    told = dict(pairs)
    if len(told) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice[:100]!r} is given twice")
    return told
