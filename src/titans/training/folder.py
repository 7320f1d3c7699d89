"""The folder of a run: made, found writable, and held by one run at a time."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titans.training.config import ConfigError


def is_main_process() -> bool:
    """Whether this is the one of several processes that writes and speaks."""
    return os.environ.get("RANK", "0") in ("", "0")


@contextmanager
def run_folder(path: str | Path) -> Iterator[Path]:
    """Make the folder, lock it against other runs, and remove it again if nothing was written into it.

    Raises:
        ConfigError: it cannot be made or written into, or another run is at work in it.
    """
    folder = Path(path)
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"training.output_dir: {folder} is a file")
        made = _make(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
        lock = _lock(folder) if is_main_process() else None
    except (OSError, ValueError) as error:
        _remove(made)
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"training.output_dir: {str(folder)!r} cannot be written: {reason}") from error
    try:
        yield folder
    finally:
        if lock is not None:
            os.close(lock)
        _remove(made)


def _make(folder: Path) -> list[Path]:
    """Make it with its parents; what was made, the innermost first."""
    missing = []
    place = folder
    while not os.path.lexists(place):
        missing.append(place)
        place = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # not empty: a run lives there
            return


def _lock(folder: Path) -> int | None:
    """An open, locked descriptor of the folder: the system lets go of it whenever the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise ConfigError(
                f"training.output_dir: another run is at work in {folder}; wait for it or choose another --output"
            ) from error  # other errors: a file system without locks
    return descriptor
