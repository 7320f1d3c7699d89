"""From the records of units to one JSON, one Markdown table and one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from titans.experiments.experiment import Experiment
from titans.experiments.machine import made_with
from titans.files import write_whole

ABSENT = "–"


@dataclass(frozen=True)
class Spread:
    """One figure of one arm over its seeds."""

    median: float
    low: float
    high: float


Summary = dict[str, dict[str, Spread]]  # arm, then figure


@dataclass(frozen=True)
class Report:
    """All records of a run.

    Args:
        experiment, command, scale, seeds: what was run.
        records: of every unit, arms of the first seed first.
    """

    experiment: Experiment
    command: str
    scale: str
    seeds: tuple[int, ...]
    records: tuple[Mapping[str, Any], ...]

    @property
    def summary(self) -> Summary:
        """Every figure of every arm over the seeds that have it."""
        found: dict[str, dict[str, list[float]]] = {}
        for record in self.records:
            arm = found.setdefault(record["arm"], {})
            for name, value in record["figures"].items():
                arm.setdefault(name, []).append(value)
        return {
            arm: {name: Spread(median(values), min(values), max(values)) for name, values in figures.items()}
            for arm, figures in found.items()
        }

    @property
    def figures(self) -> list[str]:
        """Names of all figures, in the order of the experiment's columns."""
        names = dict.fromkeys(name for record in self.records for name in record["figures"])
        kinds = list(self.experiment.columns)
        return sorted(names, key=lambda name: kinds.index(name.partition("@")[0]))

    def rows(self) -> list[list[str]]:
        """The table, headings first."""
        summary, experiment = self.summary, self.experiment
        rows = [["", *map(experiment.heading, self.figures), *experiment.beside]]
        for arm, figures in summary.items():
            cells = [self._cell(name, figures.get(name)) for name in self.figures]
            rows.append([arm, *cells, *(texts.get(arm, ABSENT) for texts in experiment.beside.values())])
        return [list(row) for row in zip(*rows, strict=True)] if experiment.figures_down else rows

    def _cell(self, name: str, spread: Spread | None) -> str:
        """The median, and the range in brackets when there is one to show."""
        if spread is None:
            return ABSENT
        middle, low, high = (self.experiment.shown(name, value) for value in (spread.median, spread.low, spread.high))
        return middle if low == high else f"{middle} ({low} to {high})"

    @property
    def failures(self) -> list[str]:
        """One line for every unit that has no figures."""
        failed = [record for record in self.records if "failure" in record]
        return [f"{record['arm']}, seed {record['seed']}: {record['failure']}" for record in failed]

    @property
    def legend(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        many = "; median over the seeds (lowest to highest)" if len(self.seeds) > 1 else ""
        return f"{self.experiment.name}, scale {self.scale}, seed{'s' * bool(many)} {seeds}{many}"


def rich_table(report: Report) -> Table:
    """The table for a terminal."""
    headings, *rows = report.rows()
    table = Table(title=report.legend)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(report: Report) -> str:
    """The table, what it shows, and the units that failed."""
    headings, *rows = report.rows()
    lines = [f"# {report.legend}", "", report.experiment.purpose, ""]
    lines += [_row(headings), _row(["---", *["---:"] * (len(headings) - 1)]), *(_row(row) for row in rows)]
    if report.experiment.note:
        lines += ["", report.experiment.note]
    if report.failures:
        lines += ["", "Failed:", *(f"- {line}" for line in report.failures)]
    return "\n".join(lines) + "\n"


def write_report(report: Report, output: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``figure.png``, each moved into place when complete."""
    from titans.experiments.picture import draw

    results = {
        "command": report.command,
        "experiment": report.experiment.name,
        "scale": report.scale,
        "seeds": report.seeds,
        "made_with": made_with(),
        "arms": {
            arm: {name: vars(spread) for name, spread in figures.items()} for arm, figures in report.summary.items()
        },
        "units": report.records,
    }
    text = json.dumps(results, indent=1) + "\n"
    write_whole(output / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_whole(output / "table.md", lambda path: path.write_text(markdown(report), encoding="utf-8"))
    write_whole(output / "figure.png", lambda path: draw(report, path))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
