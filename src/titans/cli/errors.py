"""The two ways in which a command ends badly, and how library errors become the first of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(Exception):
    """What the user gave cannot be used; the message names it. Exit code 2."""


class CommandFailed(Exception):
    """The input was fine, the work failed. Exit code 1."""


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
