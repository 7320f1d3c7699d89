"""The table and the picture of docs/results/evidence.md, from the rows in docs/results/raw/evidence.

``python -m experiments.evidence_report --picture docs/images/evidence.png``: medians over the seeds of each row (lowest
and highest in brackets); shares are taken seed by seed, from the window and the Transformer of the same seed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titans.evaluation.plots import plot_loss_by_position

RAW = Path("docs/results/raw/evidence")
LOW, HIGH = "window", "transformer"
SHOWN = {"window": "window of 64", "transformer": "full Transformer", "mag-m256": "MAG"}
COLUMNS = {
    "on": "second half",
    "share": "share",
    "reset": "memory reset every 64",
    "off": "never written",
    "long_continuous": "16 lengths, continuous",
    "long_sliding": "16 lengths, sliding",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RAW)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = read(options.folder)
    print("\n".join(table(rows)))
    if options.picture:
        draw(rows, options.picture)
    return 0


def read(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Records by row, as their files are named, and seed."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        rows.setdefault(path.stem.rpartition("-seed")[0], {})[record["seed"]] = record
    return rows


def figures(rows: dict[str, dict[int, dict[str, Any]]], name: str, column: str) -> list[float]:
    """One figure of a row for each of its seeds, those left out that have none."""
    found = []
    for seed, record in rows[name].items():
        ends = [rows[end][seed]["figures"]["on"] for end in (LOW, HIGH) if seed in rows[end]]
        if column != "share":
            found.append(record["figures"].get(column))
        elif len(ends) == 2:
            found.append((ends[0] - record["figures"]["on"]) / (ends[0] - ends[1]))
    return [x for x in found if x is not None]


def shown(values: Sequence[float], column: str) -> str:
    form = {"share": ".2f", "reset": "+.3f", "off": "+.3f"}.get(column, ".3f")
    if not values:
        return ""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} … {max(values):{form}})"


def table(rows: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Markdown, a line a row, the best second half last."""
    lines = [f"| row | seeds | {' | '.join(COLUMNS.values())} | state, kB |", "|---|" + "---:|" * (len(COLUMNS) + 2)]
    for name in sorted(rows, key=lambda name: -statistics.median(figures(rows, name, "on"))):
        cells = [shown(figures(rows, name, column), column) for column in COLUMNS]
        kilobytes = statistics.median(record["raw"]["state_bytes"] for record in rows[name].values()) / 1000
        lines.append(f"| {name} | {len(rows[name])} | {' | '.join(cells)} | {kilobytes:,.0f} |")
    return lines


def draw(rows: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Bits per byte by position, means over the seeds."""
    curves = {}
    for name, label in SHOWN.items():
        for mode, told in (("on", ""), ("reset", ", memory reset")):
            found = [x["raw"][f"by_position_{mode}"] for x in rows[name].values() if f"by_position_{mode}" in x["raw"]]
            if found:
                curves[label + told] = torch.tensor(found, dtype=torch.float64).mean(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_loss_by_position(curves, path, title="A memory on top of fair attention: loss by position", smooth=257)


if __name__ == "__main__":
    sys.exit(main())
