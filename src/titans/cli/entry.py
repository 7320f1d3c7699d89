"""The way in and the way out: run a command, turn what it raises into a line and an exit code."""

import os
import sys
from collections.abc import Sequence
from typing import cast

from titans.cli.errors import BadInput, CommandFailed, missing_extra, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``titans``; those of the process by default.

    Returns:
        The exit code: 0, 1 when the work failed, 2 for bad input, 128 + n when signal n stopped it.
    """
    try:
        import typer

        from titans.cli.app import app
    except ModuleNotFoundError as error:
        return _complain(missing_extra(error), 2)
    # The UsageError of the click that typer brings or uses, BadParameter's base.
    usage_error = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = typer.main.get_command(app).main(args=words, prog_name="titans", standalone_mode=False)
    except usage_error as error:
        return _complain(f"{error.format_message()}{_given(error, words)} (see titans --help)", 2)
    except BadInput as error:
        return _complain(str(error), 2)
    except (CommandFailed, FloatingPointError) as error:  # the latter: a memory diverged
        return _complain(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _given(error: Exception, words: list[str]) -> str:
    """What was given for the option that a usage error is about, where its message leaves that out."""
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for word, after in zip(words, [*words[1:], ""], strict=True):
            name, sign, value = word.partition("=")
            if name == option and (value if sign else after):
                return f", got {value if sign else after}"
    return ""


def _complain(message: str, code: int) -> int:
    print(f"titans: {one_line(message)}", file=sys.stderr)
    return code
