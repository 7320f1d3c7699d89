"""The picture of an experiment: a panel for every kind of figure, or for every arm."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.framework.report import Report, Spread

PANEL = (4.8, 3.9)  # inches
LEGEND = 1.8  # inches
CHARACTERS = 11  # of a title, per inch
MARKERS = "osD^vP*X<>"
Lines = dict[str, dict[str, Spread]]  # label, then x; a figure without x is at ""


def draw(report: Report, path: Path) -> None:
    """Draw ``report`` into a PNG: lines over x where figures were taken at several x, else a point for every label."""
    experiment, summary = report.experiment, report.summary
    panels: dict[str, Lines] = {}
    found: dict[str, dict[str, None]] = {}  # the x of a panel, in their order
    for name in report.figures:
        kind, _, x = name.partition("@")
        column = experiment.columns[kind]
        for arm in (arm for arm in summary if column.drawn and name in summary[arm]):
            panel, label = (arm, column.title) if experiment.by_arm else (kind, arm)
            panels.setdefault(panel, {}).setdefault(label, {})[x] = summary[arm][name]
            found.setdefault(panel, {})[x] = None
    labels = [column.title for column in experiment.columns.values()] if experiment.by_arm else [*summary]
    width = PANEL[0] * max(1, len(panels)) + LEGEND
    figure = Figure(figsize=(width, PANEL[1]), layout="constrained")
    handles = {}
    for place, (panel, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        column = next(iter(experiment.columns.values())) if experiment.by_arm else experiment.columns[panel]
        xs = [*found[panel]]
        form = ".0%" if column.form.endswith("%") else ".2f" if column.form == ".3f" else column.form
        draw_lines(axes, lines, xs, labels)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, form=form: f"{value:{form}}"))
        axes.grid(alpha=0.3)
        if experiment.by_arm:
            axes.set(xlabel=column.over, title=panel)
        elif len(xs) > 1:
            axes.set(xlabel=column.over, ylabel=column.title)
        else:
            axes.set(ylabel=experiment.heading(f"{panel}@{xs[0]}"))
        handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside right center", fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(report.legend, int(width * CHARACTERS))), fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def draw_lines(axes: Axes, lines: Lines, xs: list[str], labels: list[str]) -> None:
    """One line for every label over its x, evenly spaced, the range over seeds as a bar; a single x is spread out."""
    for label, points in lines.items():
        n, at = labels.index(label), [x for x in xs if x in points]
        spreads = [points[x] for x in at]
        reach = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        look = {"color": f"C{n % 10}", "marker": MARKERS[n % len(MARKERS)], "ms": 5, "lw": 1.4, "capsize": 3}
        places = [xs.index(x) for x in at] if len(xs) > 1 else [n]
        axes.errorbar(places, [s.median for s in spreads], reach, label=label, **look)
    axes.set_xticks(range(len(xs)), xs) if len(xs) > 1 else axes.set_xticks([])
