"""The picture of an experiment: a panel for every kind of figure, or for every arm."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from titans.experiments.report import Report, Spread

PANEL = (4.8, 3.9)  # inches
LEGEND = 1.8  # inches
CHARACTERS = 11  # of a title, per inch
MARKERS = "osD^vP*X<>"
Lines = dict[str, dict[str, Spread]]  # label, then x; a figure without x is at ""


def draw(report: Report, path: Path) -> None:
    """Draw ``report`` into a PNG: lines over x where figures were taken at several x, else a dot for every label."""
    experiment, summary = report.experiment, report.summary
    panels: dict[str, Lines] = {}
    for name in report.figures:
        kind, _, x = name.partition("@")
        column = experiment.columns[kind]
        for arm in (arm for arm in summary if column.drawn and name in summary[arm]):
            panel, label = (arm, column.title) if experiment.by_arm else (kind, arm)
            panels.setdefault(panel, {}).setdefault(label, {})[x] = summary[arm][name]
    labels = [column.title for column in experiment.columns.values()] if experiment.by_arm else [*summary]
    width = PANEL[0] * max(1, len(panels)) + LEGEND
    figure = Figure(figsize=(width, PANEL[1]), layout="constrained")
    handles = {}
    for place, (panel, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        column = next(iter(experiment.columns.values())) if experiment.by_arm else experiment.columns[panel]
        xs = [name.partition("@")[2] for name in report.figures]
        xs = [x for x in dict.fromkeys(xs) if any(x in points for points in lines.values())]
        form = ".0%" if column.form.endswith("%") else ".2f" if column.form.endswith("f") else column.form
        formatter = FuncFormatter(lambda value, _, form=form: f"{value:{form}}")
        if len(xs) > 1:
            draw_lines(axes, lines, xs, labels)
            axes.set(xlabel=column.over, **({"title": panel} if experiment.by_arm else {"ylabel": column.title}))
            axes.yaxis.set_major_formatter(formatter)
            handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        else:
            draw_dots(axes, lines, labels)
            axes.set(xlabel=panel if experiment.by_arm else experiment.heading(f"{panel}@{xs[0]}"))
            axes.xaxis.set_major_formatter(formatter)
        axes.grid(alpha=0.3)
    if handles:
        figure.legend(handles.values(), handles, loc="outside right center", fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(report.legend, int(width * CHARACTERS))), fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def draw_lines(axes: Axes, lines: Lines, xs: list[str], labels: list[str]) -> None:
    """One line for every label over its x, evenly spaced, the range over seeds as a bar."""
    for label, points in lines.items():
        n, at = labels.index(label), [x for x in xs if x in points]
        look = {"color": f"C{n % 10}", "marker": MARKERS[n % len(MARKERS)], "ms": 5, "lw": 1.4, "capsize": 3}
        middle, reach = _bars([points[x] for x in at])
        axes.errorbar([xs.index(x) for x in at], middle, reach, label=label, **look)
    axes.set_xticks(range(len(xs)), xs)


def draw_dots(axes: Axes, lines: Lines, labels: list[str]) -> None:
    """One row for every label, its median as a dot and the range over seeds as a bar."""
    for place, (label, points) in enumerate(lines.items()):
        middle, reach = _bars([*points.values()])
        axes.errorbar(middle, [place], xerr=reach, fmt="o", ms=7, capsize=4, color=f"C{labels.index(label) % 10}")
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()


def _bars(spreads: list[Spread]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the bars reach down and up."""
    return [s.median for s in spreads], [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
