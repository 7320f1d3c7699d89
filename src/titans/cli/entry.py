"""The way in and the way out: run a command, turn what it raises into a line and an exit code."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from titans.cli.errors import (
    BadInput,
    CommandFailed,
    Terminated,
    ending_on_signals,
    give_up,
    missing_extra,
    one_line,
)
from titans.names import TooLong

PATHS = {"--model", "--memory", "--config", "--output", "--append", "--input", "--questions", "--text"}
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "alloc_cpu", "Storage size calculation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Whatever goes wrong ends in one line on standard error. With ``TITANS_TRACEBACK`` set in the environment, what
    nobody foresaw shows its traceback too.

    Args:
        arguments: the words after ``titans``; those of the process by default.

    Returns:
        The exit code: 0, 1 when the work failed, 2 for bad input, 128 + n when signal n stopped it.
    """
    _take_any_character()
    try:
        with ending_on_signals():
            return _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Terminated as stop:
        return _complain(str(stop), 128 + stop.number)
    except BrokenPipeError:  # the reader of our output has seen enough
        give_up(sys.stdout)
        return 0
    except OSError as error:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return _complain(f"{name}{error.strerror or error}", 1)
    except MemoryError:
        return _complain("not enough memory", 1)
    except Exception as error:
        return _unforeseen(error)


def _run(words: list[str]) -> int:
    try:
        import typer

        from titans.cli.app import app
    except ModuleNotFoundError as error:
        return _complain(missing_extra(error), 2)
    for option, value in zip(words, [*words, None][1:], strict=True):
        name, _, given = option.partition("=") if "=" in option else (option, "", value)
        if name in PATHS and given == "":
            return _complain(f"{name}: is empty; name a file or a folder, '.' for this one", 2)
    # The UsageError of the click that typer brings or uses, BadParameter's base.
    usage_error = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
    try:
        code = typer.main.get_command(app).main(args=words, prog_name="titans", standalone_mode=False)
        _flush()
    except SystemExit as stop:  # what typer makes of a pipe whose reader is gone
        if isinstance(stop.__context__, OSError):
            raise stop.__context__ from None
        raise
    except usage_error as error:
        return _complain(f"{error.format_message()}{_given(error, words)} (see titans --help)", 2)
    except BadInput as error:
        return _complain(str(error), 2)
    except (CommandFailed, FloatingPointError, TooLong) as error:  # the second: a memory diverged
        return _complain(str(error), 1)
    except typer.Abort as abort:
        if isinstance(abort.__cause__ or abort.__context__, EOFError):  # click takes both for the user's
            return _complain(f"a file ended too early: {abort.__cause__ or abort.__context__}", 1)
        return _complain("interrupted", 130)
    return code if isinstance(code, int) else 0


def _unforeseen(error: Exception) -> int:
    if os.environ.get("TITANS_TRACEBACK"):
        traceback.print_exception(error)
    told = str(error)
    if isinstance(error, RuntimeError) and any(words in told for words in OUT_OF_MEMORY):
        return _complain(f"not enough memory: {told}", 1)
    if "InvalidCxxCompiler" in told:
        return _complain("engine 'compiled' needs a C++ compiler (g++, clang++ or $CXX)", 1)
    return _complain(f"{type(error).__name__}: {told} (TITANS_TRACEBACK=1 shows where)", 1)


def _take_any_character() -> None:
    """Characters that the terminal's or pipe's encoding lacks become ``?`` instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _flush() -> None:
    """Say now what could not be written, not at the end of the process, where nobody would catch it."""
    if sys.stdout is not None and not sys.stdout.closed:
        try:
            sys.stdout.flush()
        except OSError:
            give_up(sys.stdout)
            raise


def _given(error: Exception, words: list[str]) -> str:
    """What was given for the option that a usage error is about, where its message leaves that out."""
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for word, after in reversed(list(zip(words, [*words[1:], ""], strict=True))):  # the last one counts
            name, sign, value = word.partition("=")
            if name == option and (value if sign else after):
                return f", got {value if sign else after}"
    return ""


def _complain(message: str, code: int) -> int:
    try:
        print(f"titans: {one_line(message)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a closed terminal, a full disk: the exit code still tells
        give_up(sys.stderr)
    with suppress(OSError):
        _flush()
    return code
