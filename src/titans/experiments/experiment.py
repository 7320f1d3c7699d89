"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import BaseModel
from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from titans.experiments.report import Summary

Settings = TypeVar("Settings", bound=BaseModel)
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
    """

    folder: Path
    console: Console

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Column:
    """How figures of one kind are shown.

    Args:
        title: what the number is.
        form: its format, as in an f-string.
        over: what the x of figures ``key@x`` is, such as "length".
    """

    title: str
    form: str = ".3f"
    over: str = ""


@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """Arms that are compared, and how one of them is measured.

    A unit is one arm at one seed. Its settings are everything that its figures depend on besides the seed and the code,
    so a finished unit is known again by them.

    Args:
        name: as the command line knows it.
        purpose: one line.
        arms: ``arms(scale, **inputs)`` gives the settings of every arm by its name, in the order of the table. Names
            are file names: letters, digits, ``-``, ``_`` and ``.``. Raises ValueError or OSError for unusable input.
        unit: ``unit(settings, seed, workplace)`` gives the figures of one unit. The name of a figure is a key of
            ``columns``, or ``key@x`` for one kind of figure at several numbers x (a length, a share of noise).
        columns: how each kind of figure is shown, in the order of the table and the picture.
        inputs: names of the command's options, out of "data" and "model", that ``arms`` takes.
        beside: further columns of the table: heading, then text by arm.
        note: a paragraph under the table.
        figures_down: figures as rows and arms as columns of the table, where figures are many.
        plot: ``plot(figure, experiment, summary)`` draws the picture; default: one panel for each kind of figure. With
            an own plot the x may be any words.
    """

    name: str
    purpose: str
    arms: Callable[..., Mapping[str, Settings]]
    unit: Callable[[Settings, int, Workplace], Figures]
    columns: Mapping[str, Column]
    inputs: tuple[str, ...] = ()
    beside: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    note: str = ""
    figures_down: bool = False
    plot: Callable[[Figure, Experiment, Summary], None] | None = None

    def heading(self, figure: str) -> str:
        """The heading of the figure of this name, its x included."""
        kind, _, at = figure.partition("@")
        column = self.columns[kind]
        return f"{column.title}, {column.over} {at}" if at else column.title

    def shown(self, figure: str, value: float) -> str:
        """The number as this figure is shown."""
        return f"{value:{self.columns[figure.partition('@')[0]].form}}"
