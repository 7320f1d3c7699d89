"""The table of docs/results/mqar.md, from the units in docs/results/raw/mqar: ``python -m experiments.recall_report``.

Rows are named MODEL-LENGTH. State is what one stream carries after a text of that length.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from titans.evaluation.report import markdown_table

RAW = Path("docs/results/raw/mqar")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RAW)
    folder = parser.parse_args().folder
    print(table([json.loads(path.read_text()) for path in sorted(folder.glob("*-seed0.json"))]))
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


def _model(record: dict[str, Any]) -> str:
    return record["arm"].rpartition("-")[0]


def _right(record: dict[str, Any]) -> float:
    return record["figures"][f"accuracy@{record['settings']['length']}"]


if __name__ == "__main__":
    sys.exit(main())
