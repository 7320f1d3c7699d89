"""Inputs of any length into a memory file, in constant memory, killed and resumed to the same bits."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from titans.data import Tokenizer
from titans.data.streams import STDIN, TextInput, token_blocks
from titans.files import hash_file
from titans.models import MemoryFile, ModelState, TitansModel
from titans.models.memorize import on_grid, read_piece
from titans.models.memory_file import Forgetting, Input, changes, claimed
from titans.models.stored import Dtype
from titans.names import check_kind, path_of, unknown


@dataclass(frozen=True)
class Job:
    """What to read, and where to.

    Attributes:
        inputs: file names in order, `STDIN` once at most.
        output: the memory file. While the reading lasts it holds what is read so far and says that this is not all.
        append: an earlier memory file to read on from.
        dtype: of the stored weights when all is read.
        resume: go on with a half-read ``output``.
        text_field: of ``.jsonl`` and ``.parquet`` rows.
        save_every: seconds between two writes of what is read so far.
    """

    inputs: tuple[str, ...]
    output: Path
    append: Path | None = None
    dtype: Dtype = "float32"
    resume: bool = False
    text_field: str = "text"
    save_every: float = 30.0

    def __post_init__(self) -> None:
        check_kind("inputs", self.inputs, (tuple, list), "a tuple of file names")
        if self.dtype not in get_args(Dtype):
            raise ValueError(unknown("dtype", self.dtype, get_args(Dtype)))
        object.__setattr__(self, "output", path_of("output", self.output))
        if self.append is not None:
            object.__setattr__(self, "append", path_of("append", self.append))


@dataclass(frozen=True)
class Progress:
    """How far a reading is.

    Attributes:
        tokens: read in this run.
        seconds: of this run.
        left: bytes of the inputs that are not read yet; None where nobody knows.
        bytes: read in this run.
    """

    tokens: int
    seconds: float
    bytes: int
    left: int | None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far."""
        return None if self.left is None or not self.bytes else self.left / self.bytes * self.seconds


def memorize_files(
    model: TitansModel, tokenizer: Tokenizer, job: Job, tell: Callable[[Progress], object] = lambda progress: None
) -> MemoryFile:
    """Read files into a memory file.

    Every document begins with the separator, as in training, and all go into one stream, which is never reset. Reading
    is cut at fixed places (`titans.models.memorize`): at multiples of about 4,096 tokens of the stream and at the end
    of every input. So a reading that was killed and resumed, or went on from an earlier memory file, gives the bits of
    one that was not. When it is interrupted, what is read so far is in the output.

    Args:
        model: whose memory it is.
        tokenizer: the model's.
        job: what to read.
        tell: is told about the progress after every piece.

    Returns:
        What was written.

    Raises:
        ValueError: an input is not what it seems or holds no text, the output exists already, or what is to be resumed
            or appended to is not of this model or of these inputs; the message names it.
        OSError: an input cannot be read.
        FloatingPointError: a memory diverged; names the layer.
    """
    check_kind("model", model, TitansModel, "a model of titans, no grafted decoder")
    inputs = [TextInput(name, job.text_field) for name in job.inputs]
    file, resumed = _start(job)
    reading = _Reading(model, job, file, resumed)
    if file is not None and resumed and file.unfinished is None:
        return file
    try:
        for at, source in enumerate(inputs):
            reading.read(at, source, tokenizer, inputs[at + 1 :], tell)
    except BaseException:
        reading.keep()
        raise
    return reading.finish()


def _start(job: Job) -> tuple[MemoryFile | None, bool]:
    """What to go on from, and whether that is this very job."""
    if not job.inputs:
        raise ValueError("--input: names no input")
    if job.inputs.count(STDIN) > 1:
        raise ValueError("--input: standard input can be read once")
    _check_writable(job.output)
    if job.append is not None and os.path.realpath(job.append) == os.path.realpath(job.output):
        raise ValueError(f"--output: {job.output} is what --append reads; give another name")
    if job.output.exists():
        if not job.resume:
            raise ValueError(f"--output: {job.output} exists; go on with --resume, or give another name")
        file = MemoryFile.open(job.output)
        _check_resumable(file, job)
        return file, True
    if job.append is None:
        return None, False
    file = MemoryFile.open(job.append)
    if file.unfinished is not None:
        raise ValueError(f"--append: memory file {str(job.append)!r} is half-read: finish it with --resume")
    if file.state.rows != 1:
        raise ValueError(f"--append: memory file {str(job.append)!r} holds {file.state.rows} streams, not one")
    return file, False


def _check_writable(output: Path) -> None:
    """Say now what would be known after minutes of reading."""
    if output.is_dir():
        raise ValueError(f"--output: {output} is a folder")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--output: {output}: cannot write into {folder}")


def _check_resumable(file: MemoryFile, job: Job) -> None:
    """Raise a ValueError unless ``file`` is what this job has written."""
    names = _names(job)
    told = file.unfinished
    if told is None:
        return _check_same(file, job, names)
    if told.get("inputs") != names:
        was = ", ".join(map(str, told.get("inputs", ())))
        raise ValueError(f"--input: {', '.join(names)}, but {job.output} was reading {was}")
    if told.get("append") != _append_hash(job):
        raise ValueError(f"--append: {job.append}, but {job.output} did not start from that")


def _check_same(file: MemoryFile, job: Job, names: list[str]) -> None:
    """Raise a ValueError unless the finished ``file`` is what this job would make."""
    before, read = file.inputs[: -len(names)], file.inputs[-len(names) :]
    if [item.name for item in read] != names:
        told = ", ".join(item.name for item in file.inputs)
        raise ValueError(f"--output: {job.output} is a finished memory of {told or 'something else'}")
    for name, item in zip(job.inputs, read, strict=True):
        if name != STDIN and Path(name).is_file() and hash_file(name) != item.sha256:
            raise ValueError(f"--input: {name} is not what {job.output} has read, or has changed since")
    if before != (() if job.append is None else MemoryFile.open(job.append).inputs):
        raise ValueError(f"--append: {job.append}, but {job.output} did not start from that")
    if (file.stored or "float32") != job.dtype:
        raise ValueError(f"--dtype: {job.dtype}, but {job.output} is finished and of {file.stored or 'float32'}")


def _names(job: Job) -> list[str]:
    return [TextInput(name).shown_name for name in job.inputs]


def _append_hash(job: Job) -> str | None:
    return None if job.append is None else hash_file(job.append)


@dataclass(frozen=True)
class _Place:
    """Where a reading stands, after a whole number of pieces.

    Attributes:
        state, forgotten: what is remembered; what `Forgetting.told` says.
        inputs: those that are finished, of this job and before.
        tokens, digest: of the input that is open, and the hash of its ids.
    """

    state: ModelState | None = None
    forgotten: tuple[tuple[float, ...], ...] = ()
    inputs: tuple[Input, ...] = ()
    tokens: int = 0
    digest: str = ""


class _Reading:
    """A job on its way. ``place`` changes in one step, so that it is right whenever something interrupts."""

    def __init__(self, model: TitansModel, job: Job, file: MemoryFile | None, resumed: bool):
        self.model, self.job = model, job
        self.place, self.before = _Place(), 0
        if file is not None:
            path = job.output if resumed or job.append is None else job.append
            told = (file.unfinished or {}) if resumed else {}
            self.before = told.get("before", len(file.inputs))
            tokens, digest = told.get("tokens", 0), told.get("digest", "")
            self.place = _Place(claimed(file.state, model, path), file.forgotten, file.inputs, tokens, digest)
        self.kept = self.place
        self.append = _append_hash(job)
        self.fresh = 0  # tokens of this run
        self.written = _which(job.output) if resumed else None
        self.started = self.saved = time.monotonic()

    def read(
        self, at: int, source: TextInput, tokenizer: Tokenizer, later: list[TextInput], tell: Callable[[Progress], Any]
    ) -> None:
        """One input, or what is left of it."""
        done = self.place.inputs[self.before :]
        if at < len(done):
            if source.path is not None and source.path.is_file() and hash_file(source.path) != done[at].sha256:
                raise ValueError(f"--input: {source.name} has changed since it was read")
            return
        known = self.place.tokens
        changed = ValueError(f"--input: {source.name} has changed since its first {known:,} tokens were read")
        tokens, digest, skipped = 0, hashlib.sha256(), 0
        begin = 0 if self.place.state is None else self.place.state.seen[0] - known
        for piece in on_grid(_naming(source, token_blocks(source.documents(), tokenizer)), begin, self.model):
            tokens += len(piece)
            digest.update(piece.astype("<i4").tobytes())
            if tokens <= known:
                skipped = source.bytes
                if tokens == known and digest.hexdigest() != self.place.digest:
                    raise changed
                continue
            if self.place.tokens != tokens - len(piece):
                raise changed
            self._take(piece, tokens, digest.hexdigest())
            tell(self._progress(source, skipped, later))
            if time.monotonic() - self.saved >= self.job.save_every:
                self.keep()
        if tokens < known:
            raise changed
        if not tokens:
            raise ValueError(f"--input: {source.name} holds no text")
        read = Input(source.shown_name, source.bytes, source.sha256, tokens)
        self.place = replace(self.place, inputs=(*self.place.inputs, read), tokens=0, digest="")

    def _take(self, piece: np.ndarray, tokens: int, digest: str) -> None:
        forgetting = Forgetting(self.place.forgotten)
        with forgetting.watch(self.model):
            state = read_piece(self.model, piece, self.place.state)
        self.place = _Place(state, forgetting.told, self.place.inputs, tokens, digest)
        self.fresh += len(piece)

    def keep(self) -> None:
        """Write what is read so far, marked as half of it."""
        place = self.place
        if place.state is None or place is self.kept:
            return
        unfinished = {
            "inputs": _names(self.job),
            "append": self.append,
            "before": self.before,
            "tokens": place.tokens,
            "digest": place.digest,
        }
        self._write(MemoryFile(place.state, place.inputs, (), place.forgotten, unfinished))
        self.kept, self.saved = place, time.monotonic()

    def finish(self) -> MemoryFile:
        """Write the whole memory."""
        place = self.place
        assert place.state is not None
        layers = tuple(changes(self.model, place.state, place.forgotten))
        file = MemoryFile(place.state, place.inputs, layers, place.forgotten, None, self.job.dtype)
        self._write(file)
        return file

    def _write(self, file: MemoryFile) -> None:
        """Replace what this reading has written, never what somebody else put there meanwhile."""
        if _which(self.job.output) != self.written:
            raise ValueError(f"--output: {self.job.output} was written by another process meanwhile; it stays as it is")
        file.save(self.job.output)
        self.written = _which(self.job.output)

    def _progress(self, source: TextInput, skipped: int, later: list[TextInput]) -> Progress:
        sizes = [item.size for item in (source, *later)]
        known = [size for size in sizes if size is not None]
        left = max(0, sum(known) - source.bytes) if len(known) == len(sizes) else None
        return Progress(self.fresh, time.monotonic() - self.started, source.bytes - skipped, left)


def _which(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from one that has taken its place; None where there is none."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    return told.st_ino, told.st_mtime_ns, told.st_size


def _naming(source: TextInput, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same blocks; what goes wrong while they are read names the input."""
    try:
        yield from blocks
    except ValueError as error:
        named = "" if source.shown_name in str(error) else f"{source.name}: "
        raise ValueError(f"--input: {named}{error}") from error
