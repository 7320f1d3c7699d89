"""What an experiment is, and how one is found in a file."""

import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

Figures = dict[str, float]


class Stopped(Exception):
    """A signal stopped a unit after its checkpoint was saved; ``signal`` is its number."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


@dataclass(frozen=True)
class Workplace:
    """Where a unit works.

    Args:
        folder: its own folder, kept when it is done; what lies there from an attempt before may be gone on with.
        console: where it shows its progress.
        raw: what its record keeps besides the figures, such as the losses of all steps; as JSON holds it.
    """

    folder: Path
    console: Console
    raw: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Column:
    """How figures of one kind are shown.

    Args:
        title: what the number is.
        form: its format, as in an f-string.
        over: what the x of figures ``key@x`` is, such as "length".
        drawn: does it get a panel of the picture?
    """

    title: str
    form: str = ".3f"
    over: str = ""
    drawn: bool = True


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared, and how one of them is measured.

    A unit is one arm at one seed. Its settings are everything that its figures depend on besides the seed and the code,
    so a finished unit is known again by them.

    Args:
        name: letters, digits and ``-``.
        purpose: one line.
        arms: ``arms(scale, **inputs)`` gives the settings of every arm by its name, in the order of the table. Names
            are file names: letters, digits, ``-``, ``_`` and ``.``. Raises ValueError or OSError for unusable input.
        unit: ``unit(settings, seed, workplace)`` gives the figures of one unit. The name of a figure is a key of
            ``columns``, or ``key@x`` for one kind of figure at several x (lengths, shares of noise, conditions).
        columns: how each kind of figure is shown, in the order of the table and the picture.
        inputs: names of the command's options that ``arms`` takes: "data" and "model" (a Path), "max_context" (tokens),
            "row" (a name: ``arms`` gives this one arm, and the report is about all rows that the output folder holds),
            "set" (changes of the settings, a tuple of ``field.field=value``).
        note: a paragraph under the table.
        by_arm: figures are compared within an arm: arms as columns of the table and as panels of the picture.
        file: where it was loaded from; None if the command knows its name.
    """

    name: str
    purpose: str
    arms: Callable[..., Mapping[str, BaseModel]]
    unit: Callable[[Any, int, Workplace], Figures]
    columns: Mapping[str, Column]
    inputs: tuple[str, ...] = ()
    note: str = ""
    by_arm: bool = False
    file: Path | None = None

    def heading(self, figure: str) -> str:
        """The heading of the figure of this name, its x included."""
        kind, _, at = figure.partition("@")
        column = self.columns[kind]
        return f"{column.title}, {column.over} {at}" if at else column.title

    def shown(self, figure: str, value: float) -> str:
        """The number as this figure is shown."""
        return f"{value:{self.columns[figure.partition('@')[0]].form}}"


def load(file: Path) -> Experiment:
    """The ``EXPERIMENT`` that a Python file defines; the file may import its neighbours, as a script may.

    Raises:
        ValueError: there is no such file, it cannot be run, or it defines none.
    """
    if not file.is_file():
        raise ValueError(f"NAME: no file {file}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    try:
        experiment = runpy.run_path(str(file), run_name=file.stem).get("EXPERIMENT")
    except Exception as error:
        raise ValueError(f"NAME: {file} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise ValueError(f"NAME: {file} defines no EXPERIMENT")
    return replace(experiment, file=file)
