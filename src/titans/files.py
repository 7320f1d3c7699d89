"""One way to write a file or a folder: aside first, then moved into place, so that nobody ever reads half of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from titans.names import path_of


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file or folder beside ``path``, then move it there; an old one is replaced.

    A link is followed: what it points to is replaced. A file is never put in the place of a folder nor the other way
    round, nothing in that of a device or a pipe, and entries of an old folder that the new one lacks, which are
    somebody else's, move into the new one.
    Permissions are those of any new file, as the umask says.

    Args:
        path: what shall be there afterwards; missing parent folders are made.
        write: called with the path to write to, which does not exist yet and keeps ``path``'s name.

    Raises:
        OSError: the place cannot be written, and names it; what was there before is still there.
    """
    path = Path(os.path.realpath(path_of("path", path)))
    with naming(path):
        _write_whole(path, write)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", dir=path.parent))
    try:
        new = aside / path.name
        write(new)
        open_to_umask(aside)
        if path.exists() and not (path.is_dir() or path.is_file()):
            raise OSError(errno.EEXIST, "is a device or a pipe, and not ours to replace", str(path))
        if path.exists() and path.is_dir() != new.is_dir():
            kind = errno.EISDIR if path.is_dir() else errno.ENOTDIR
            raise OSError(kind, f"is a {'folder' if path.is_dir() else 'file'}, and not ours to replace", str(path))
        if path.is_dir():
            _swap_folder(path, new, aside / "old")
        else:
            os.replace(new, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system name ``path``: a full disk's name nothing, and safetensors has a kind of its own."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        aside = f"{os.sep}.{path.name[:64]}."
        if error.errno is not None and (error.filename is None or aside in str(error.filename)):
            error.filename = str(path)
        raise


def check_ours(folder: Path, names: Iterable[str], sign: str) -> None:
    """Look whether files that will be written anew are ours, before any work is done for them.

    Args:
        folder: where they will be, if it exists.
        names: of the files.
        sign: pattern of a file below the folder that is written before any of them.

    Raises:
        ValueError: one is there without the sign: somebody else's, and nothing to replace.
    """
    there = [folder / name for name in names if os.path.lexists(folder / name)]
    if there and not any(folder.glob(sign)):
        raise ValueError(f"output: {there[0]} is there, and is not ours to replace; choose another output")


def _swap_folder(path: Path, new: Path, old: Path) -> None:
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    for entry in old.iterdir():
        if not os.path.lexists(path / entry.name):
            os.replace(entry, path / entry.name)


def open_to_umask(folder: Path) -> None:
    """Give every file below ``folder`` the permissions of a new one; some libraries write files for the owner alone."""
    probe = folder / ".mode"
    probe.touch()  # reading the umask itself would change it for other threads
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for place, _, names in os.walk(folder):
        for name in names:
            if not (file := Path(place, name)).is_symlink():
                file.chmod(mode)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path_of("path", path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a tensor, row after row, as they lie in memory."""
    # A copy, always: a tensor of one entry counts as contiguous whatever its strides are, and `view` asks for 1.
    values = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
    return values.view(torch.uint8).numpy().tobytes()


def hash_tensors(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> str:
    """SHA-256 of tensors, their names, types and shapes, and of the ``words`` that go with them."""
    digest = hashlib.sha256(json.dumps(dict(words), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
