"""The table and the picture of docs/results/mqar.md, from the units in docs/results/raw/mqar.

``python -m experiments.recall_report --picture docs/images/mqar.png``. Rows are named MODEL-LENGTH; the picture has
accuracy against the bytes of state after a text of that length.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from titans.evaluation.plots import plot_accuracy_by_state
from titans.evaluation.report import markdown_table

RAW = Path("docs/results/raw/mqar")
TASK = "MQAR, zoology's setting"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RAW)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*-seed0.json"))]
    print(table(records))
    if options.picture:
        plot_accuracy_by_state(runs(records), TASK, options.picture)
    return 0


def table(records: list[dict[str, Any]]) -> str:
    """A line for every unit, by length and from the best on."""
    heading = ["row", "tokens", "pairs", "right", "last 20 losses, nats", "state, kB", "parameters", "steps"]
    lines = []
    for record in sorted(records, key=lambda r: (r["settings"]["length"], -_right(r))):
        task, losses = record["settings"], record["raw"]["losses"][-20:]
        shown = [f"{100 * _right(record):.1f} %", f"{sum(losses) / len(losses):.2f}"]
        shown += [f"{record['figures'][name] / unit:,.0f}" for name, unit in (("state", 1000), ("parameters", 1))]
        lines.append([_model(record), str(task["length"]), str(task["pairs"]), *shown, str(task["steps"])])
    return markdown_table(heading, lines)


def runs(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `plot_accuracy_by_state` takes."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        told = {"task": TASK, "length": record["settings"]["length"], "score": _right(record)}
        cells = found.setdefault(_model(record), {"cells": []})["cells"]
        cells.append({**told, "state_bytes": record["figures"]["state"]})
    return found


def _model(record: dict[str, Any]) -> str:
    return record["arm"].rpartition("-")[0]


def _right(record: dict[str, Any]) -> float:
    return record["figures"][f"accuracy@{record['settings']['length']}"]


if __name__ == "__main__":
    sys.exit(main())
