"""From the records of units to one JSON, one Markdown table and one picture."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.framework.experiment import Experiment
from experiments.framework.machine import made_with
from titans.files import write_whole

ABSENT = "–"


@dataclass(frozen=True)
class Spread:
    """One figure of one arm over its seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """All records of a run.

    Args:
        experiment, scale: what was run.
        records: of every unit, arms of the first seed first.
        command: that made it.
    """

    experiment: Experiment
    scale: str
    records: tuple[Mapping[str, Any], ...]
    command: str = ""

    @property
    def summary(self) -> dict[str, dict[str, Spread]]:
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
        """Names of all figures, in the order of the experiment's columns, then of the numbers x."""
        names = dict.fromkeys(name for record in self.records for name in record["figures"])
        kinds = list(self.experiment.columns)

        def order(name: str) -> tuple[int, float]:
            kind, _, x = name.partition("@")
            number = re.match(r"\d+(\.\d+)?", x)
            return kinds.index(kind), float(number[0]) if number else 0.0

        return sorted(names, key=order)

    def rows(self) -> list[list[str]]:
        """The table, headings first."""
        rows = [["", *map(self.experiment.heading, self.figures)]]
        for arm, figures in self.summary.items():
            rows.append([arm, *(self._cell(name, figures.get(name)) for name in self.figures)])
        return [list(row) for row in zip(*rows, strict=True)] if self.experiment.by_arm else rows

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
        seeds = sorted({record["seed"] for record in self.records})
        many = "; median over the seeds (lowest to highest)" if len(seeds) > 1 else ""
        return f"{self.experiment.name}, scale {self.scale}, seed{'s' * bool(many)} {', '.join(map(str, seeds))}{many}"

    @property
    def table(self) -> str:
        """The table in Markdown."""
        headings, *rows = self.rows()
        rule = ["---", *["---:"] * (len(headings) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def markdown(report: Report) -> str:
    """The table, what it shows, and the units that failed."""
    parts = [f"# {report.legend}", report.experiment.purpose, report.table, report.experiment.note]
    if report.failures:
        parts.append("\n".join(["Failed:", "", *(f"- {line}" for line in report.failures)]))
    return "\n\n".join(filter(None, parts)) + "\n"


def write_report(report: Report, output: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``figure.png``, each moved into place when complete."""
    from experiments.framework.picture import draw

    results = {
        "command": report.command,
        "experiment": report.experiment.name,
        "scale": report.scale,
        "seeds": sorted({record["seed"] for record in report.records}),
        "made_with": made_with(),
        "arms": {
            arm: {name: vars(spread) for name, spread in figures.items()} for arm, figures in report.summary.items()
        },
        "units": [{name: value for name, value in record.items() if name != "raw"} for record in report.records],
    }
    write_json(output / "results.json", results)
    write_whole(output / "table.md", lambda path: path.write_text(markdown(report), encoding="utf-8"))
    write_whole(output / "figure.png", lambda path: draw(report, path))


def write_json(path: Path, value: Any) -> None:
    """Write ``value``, whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
