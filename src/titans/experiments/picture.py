"""The picture of an experiment: a panel for every kind of figure."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from titans.experiments.experiment import Experiment
from titans.experiments.report import Report, Summary

PANEL = (4.8, 3.9)  # inches
LEGEND = 1.8  # inches
CHARACTERS = 11  # of a title, per inch
MARKERS = "osD^vP*X<>"


def draw(report: Report, path: Path) -> None:
    """Draw ``report`` into a PNG."""
    figure = Figure(layout="constrained")
    plot = report.experiment.plot or draw_panels
    plot(figure, report.experiment, report.summary)
    room = int(figure.get_size_inches()[0] * CHARACTERS)
    figure.suptitle("\n".join(textwrap.wrap(report.legend, room)), fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def draw_panels(figure: Figure, experiment: Experiment, summary: Summary) -> None:
    """A panel for every kind of figure: lines over x where it was taken at several x, else a dot for every arm.

    The number of parameters gets no panel: it is what the arms share.
    """
    present = {name for figures in summary.values() for name in figures}
    kinds = [kind for kind in experiment.columns if kind != "parameters" and any(_at(name, kind) for name in present)]
    figure.set_size_inches(PANEL[0] * max(1, len(kinds)) + LEGEND, PANEL[1])
    lines: dict[str, Any] = {}
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        if len([name for name in present if _at(name, kind)]) > 1:
            draw_lines(axes, experiment, summary, kind)
            handles, labels = axes.get_legend_handles_labels()
            lines.update(zip(labels, handles))
        else:
            draw_dots(axes, experiment, summary, next(name for name in present if _at(name, kind)))
    if lines:
        figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)


def draw_lines(axes: Axes, experiment: Experiment, summary: Summary, kind: str) -> None:
    """One line for every arm over the x of its figures ``kind@x``, the range over seeds as a bar."""
    ticks: set[float] = set()
    for place, (arm, figures) in enumerate(summary.items()):
        points = sorted((float(name.partition("@")[2]), spread) for name, spread in figures.items() if _at(name, kind))
        if points:
            xs, spreads = zip(*points, strict=True)
            ticks.update(xs)
            middle = [spread.median for spread in spreads]
            reach = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            look = {"color": f"C{place % 10}", "marker": MARKERS[place % len(MARKERS)], "ms": 5, "lw": 1.4}
            axes.errorbar(xs, middle, reach, label=arm, capsize=3, **look)
    if min(ticks) > 0 and max(ticks) >= 4 * min(ticks):
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick:,g}" for tick in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    column = experiment.columns[kind]
    axes.set(ylabel=column.title, xlabel=column.over)
    axes.yaxis.set_major_formatter(_formatter(column.form))
    axes.grid(alpha=0.3)


def draw_dots(axes: Axes, experiment: Experiment, summary: Summary, name: str) -> None:
    """One row for every arm, its median as a dot and the range over seeds as a bar."""
    arms = [arm for arm, figures in summary.items() if name in figures]
    for place, arm in enumerate(arms):
        spread = summary[arm][name]
        reach = [[spread.median - spread.low], [spread.high - spread.median]]
        axes.errorbar([spread.median], [place], xerr=reach, fmt="o", ms=7, capsize=4, color=f"C{place % 10}")
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set(xlabel=experiment.heading(name))
    axes.xaxis.set_major_formatter(_formatter(experiment.columns[name.partition("@")[0]].form))
    axes.grid(alpha=0.3)


def _at(name: str, kind: str) -> bool:
    return name.partition("@")[0] == kind


def _formatter(form: str) -> FuncFormatter:
    form = ".0%" if form.endswith("%") else ".2f" if form.endswith("f") else form
    return FuncFormatter(lambda value, _: f"{value:{form}}")
