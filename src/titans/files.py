"""One way to write a file or a folder: aside first, then moved into place, so that nobody ever reads half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file or folder beside ``path``, then move it there; an old one is replaced.

    Args:
        path: what shall be there afterwards; missing parent folders are made.
        write: called with the path to write to, which does not exist yet and keeps ``path``'s suffix.

    Raises:
        OSError: the place cannot be written; what was there before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = aside / path.name
        write(new)
        if path.is_dir() and not path.is_symlink():
            os.replace(path, aside / "old")
        os.replace(new, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
