"""``titans memorize``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from titans.cli.errors import Terminated, checking_input, say
from titans.cli.model import open_model

if TYPE_CHECKING:
    from titans.reading import Progress


def memorize(
    model: Annotated[Path, typer.Option(help="Folder of a saved model, its tokenizer in it.")],
    input_: Annotated[
        list[str], typer.Option("--input", metavar="FILE", help="Text, .jsonl, .parquet, or - for standard input.")
    ],
    output: Annotated[Path, typer.Option(help="Memory file to write.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More inputs.")] = None,
    append: Annotated[Path | None, typer.Option(help="Memory file to read on from.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a half-read output.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "int8"], typer.Option(help="Of the stored weights.")] = "float32",
    text_field: Annotated[str, typer.Option(help="Key or column of .jsonl and .parquet rows.")] = "text",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> int:
    """Read files of any length into a memory file, in constant memory."""
    language_model, tokenizer = open_model(model, device)
    with checking_input():
        from titans.reading import Job, memorize_files

        job = Job((*input_, *(more or ())), output, append, dtype, resume, text_field)
        meter = Meter()
        try:
            file = memorize_files(language_model, tokenizer, job, meter.tell)
        except (KeyboardInterrupt, Terminated) as stop:
            meter.close()
            kept = f"what is read is in {output}, the same command with --resume goes on"
            say(f"stopped; {kept if _half_read(output) else 'nothing was read yet'}")
            return 128 + getattr(stop, "number", 2)
        finally:
            meter.close()
    size = output.stat().st_size
    typer.echo(f"{file.tokens:,} tokens in {size:,} bytes; memory in {output}")
    return 0


def _half_read(output: Path) -> bool:
    """Is there something to go on with, and not somebody else's memory?"""
    from titans.models import MemoryFile

    try:
        return MemoryFile.open(output).unfinished is not None
    except (OSError, ValueError):
        return False


class Meter:
    """Progress on standard error: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._last = time.monotonic() if not self._live else 0.0
        self._width = 0

    def tell(self, progress: Progress) -> None:
        """Show it unless something was shown a moment ago."""
        now = time.monotonic()
        if now - self._last < (0.5 if self._live else 10):
            return
        self._last = now
        line = f"{progress.tokens:,} tokens, {progress.rate:,.0f} tokens/s"
        if progress.seconds_left is not None:
            share = progress.bytes / max(1, progress.bytes + (progress.left or 0))
            line += f", {share:.0%}, {_duration(progress.seconds_left)} left"
        say(f"\r{line.ljust(self._width)}" if self._live else line, end="" if self._live else "\n")
        self._width = len(line)

    def close(self) -> None:
        """End the line."""
        if self._width and self._live:
            say("")
        self._width = 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
