"""The table and the picture of docs/results/evidence.md, from the rows in docs/results/raw/evidence.

``python -m experiments.evidence_report --picture docs/images/evidence.png``: medians over the seeds of each row (lowest
to highest); shares are taken seed by seed, from the window and the Transformer of the same seed.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.evidence import EXPERIMENT
from experiments.framework import Column, Report
from titans.evaluation.plots import plot_loss_by_position

RAW = Path("docs/results/raw/evidence")
LOW, HIGH = "window", "transformer"
SHOWN = {"window": "window of 64", "transformer": "full Transformer", "mag-m256": "MAG"}
COLUMNS = {
    "on": Column("second half"),
    "share": Column("share", ".2f"),
    "reset": Column("memory reset every 64", "+.3f"),
    "off": Column("never written", "+.3f"),
    "long_continuous": Column("16 lengths, continuous"),
    "long_sliding": Column("16 lengths, sliding"),
    "state": Column("state, kB", ",.0f"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RAW)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = read(options.folder)
    print(Report(replace(EXPERIMENT, columns=COLUMNS), "small", tuple(records(rows))).table)
    if options.picture:
        draw(rows, options.picture)
    return 0


def read(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Units' records by row, as their files are named, and seed; the best second half last."""
    rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        rows[path.stem.rpartition("-seed")[0]][record["seed"]] = record
    middle = {name: statistics.median(x["figures"]["on"] for x in rows[name].values()) for name in rows}
    return {name: rows[name] for name in sorted(rows, key=lambda name: -middle[name])}


def records(rows: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What a `Report` takes: of every unit the figures shown, its share and its state among them."""
    found = []
    for name, seeds in rows.items():
        for seed, record in seeds.items():
            figures = {kind: value for kind, value in record["figures"].items() if kind in COLUMNS}
            figures["state"] = record["raw"]["state_bytes"] / 1000
            if seed in rows[LOW] and seed in rows[HIGH]:
                low, high = (rows[end][seed]["figures"]["on"] for end in (LOW, HIGH))
                figures["share"] = (low - figures["on"]) / (low - high)
            found.append({"arm": f"{name} ({len(seeds)})", "seed": seed, "figures": figures})
    return found


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
