"""The two ways in which a command ends badly, and how library errors become the first of them."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from unicodedata import category


class BadInput(Exception):
    """What the user gave cannot be used; the message names it. Exit code 2."""


class CommandFailed(Exception):
    """The input was fine, the work failed. Exit code 1."""


def named_folder(value: str) -> Path:
    """The folder of an option; no name at all is not the working directory."""
    if not value:
        raise BadInput("--output: is empty; name a folder, '.' for this one")
    return Path(value)


class Terminated(BaseException):
    """SIGTERM, or SIGHUP from a closed terminal, came while a command was at work. Exit code 128 + the signal's number.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the command like Ctrl-C does, so that it can keep what it has and say so.

    A signal that is ignored (``nohup``) stays ignored.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def say(line: str, end: str = "\n") -> None:
    """A word on the way, on standard error. A closed terminal or a full disk behind it ends no work."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(line + end)
        sys.stderr.flush()
    except (OSError, ValueError):
        give_up(sys.stderr)


def write_text(piece: str) -> None:
    """Text of a model on standard output as it comes; on a terminal none of it moves the cursor or sets a title."""
    if sys.stdout.isatty():
        piece = "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in piece)
    sys.stdout.write(piece)
    sys.stdout.flush()


def give_up(stream: object) -> None:
    """Let what is still to be written to a broken stream go nowhere."""
    with suppress(OSError, ValueError, AttributeError):  # no stream of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


LONGEST = 1000  # characters of a complaint


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks included, as one space, and no longer than anyone reads."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to install when an optional package is missing.

    Raises:
        ModuleNotFoundError: the missing module is our own, which no installation would cure.
    """
    name = (error.name or "").partition(".")[0]
    if not name:
        return str(error)
    if name == "titans":
        raise error
    return f"this command needs {name}: pip install 'titans-miras[train]'"


@contextmanager
def checking_input(what: str = "") -> Iterator[None]:
    """Open while user input is read and checked: what the library raises there is the input's fault.

    Args:
        what: put before the message when the library does not name the input itself.

    Raises:
        BadInput: for a wrong value, token id or file, or for a missing extra.
    """
    from pydantic import ValidationError
    from safetensors import SafetensorError

    from titans.training.config import describe

    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(missing_extra(error)) from error
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else what
        raise BadInput(_join(name, error.strerror or str(error))) from error
    except ValidationError as error:
        raise BadInput(_join(what, describe(error))) from error
    except RecursionError as error:
        raise BadInput(_join(what, "nested too deeply")) from error
    except (ValueError, TypeError, ImportError, SafetensorError) as error:
        raise BadInput(_join(what, str(error))) from error


def _join(what: str, message: str) -> str:
    return f"{what}: {message}" if what and what not in message else message
