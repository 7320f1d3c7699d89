"""Tables and pictures of docs/results/lasting.md from the runs of lasting.py, one line per run and seed.

``python benchmarks/lasting_report.py``; a picture of some: ``--only mag-600 swa-600 --picture FILE``. With ``--seeds``
one line per run: medians over its seeds, the largest gradient norm of them all, and the range of "train".
Bits per byte: "train" is the mean of the last 20 steps; "beyond" is the validation loss beyond the window, "reset" and
"off" what it costs there to reset the memory at every segment or never to write it; "reading on" is a continuous
reading of long streams minus one that restarts every 512 bytes, at positions 512-2,048, 2,048-8,192, from 8,192 on, and
on the whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

HEADER = ("run", "train", "beyond", "reset", "off", "512-2k", "2k-8k", "8k-32k", "reading on", "largest gradient norm")
NOTHING = "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/results/raw/lasting"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs, in this order")
    parser.add_argument("--seeds", action="store_true", help="one line per run: medians over its seeds")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--labels", nargs="+", help="of the runs in the picture, in this order")
    options = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
    if options.only:
        runs = [run for name in options.only for run in runs if run["name"] == name]
    header = (*HEADER, "range of train") if options.seeds else HEADER
    rows = _medians(runs) if options.seeds else [_row(_label(run), run) for run in runs]
    measured = [i for i in range(len(header)) if any(i < len(row) and row[i] != NOTHING for row in rows)]
    print("| " + " | ".join(header[i] for i in measured) + " |\n|" + "---|" * len(measured))
    for row in rows:
        print("| " + " | ".join(row[i] for i in measured if i < len(row)) + " |")
    if options.picture:
        runs = [run for run in runs if "on" in run]  # the others were not measured, or failed
        runs = _middle_curves(runs) if options.seeds else runs
        labels = options.labels or [_label(run) for run in runs]
        if len(labels) != len(runs):
            parser.error(f"--labels: {len(labels)} given for {len(runs)} measured runs: {[r['name'] for r in runs]}")
        _draw(dict(zip(labels, runs, strict=True)), options.picture)
    return 0


def _figures(run: dict) -> list[float | None]:
    """What stands in a line after the run's name, in the order of HEADER."""
    on = run.get("beyond_window_on")
    cost = [None if run.get(f"beyond_window_{m}") is None else run[f"beyond_window_{m}"] - on for m in ("reset", "off")]
    drift = run.get("continuous_minus_restarted", {})
    later = [drift.get(bucket) for bucket in ("512-2048", "2048-8192", "8192-32768")]
    later.append(run["continuous_mean"] - run["restarted_mean"] if drift else None)
    return [run["final_loss"], on, *cost, *later, run["largest_gradient_norm"]]


def _label(run: dict) -> str:
    return f"{run['name']}, seed {run['seed']}" if "seed" in run else run["name"]


def _by_name(runs: list[dict]) -> dict[str, list[dict]]:
    return {name: [run for run in runs if run["name"] == name] for name in dict.fromkeys(r["name"] for r in runs)}


def _middle_curves(runs: list[dict]) -> list[dict]:
    """One run per name: the medians over its seeds of all that is drawn."""
    middle = []
    for name, same in _by_name(runs).items():
        curves = {
            part: {place: statistics.median(run[part][place] for run in same) for place in same[0][part]}
            for part in ("on", "continuous_minus_restarted")
            if part in same[0]
        }
        middle.append({"name": name, **curves})
    return middle


def _row(name: str, run: dict) -> list[str]:
    return [name, run["failure"]] if "failure" in run else [name, *_shown(_figures(run))]


def _shown(figures: list[float | None]) -> list[str]:
    formats = (".3f", ".3f", *["+.3f"] * 6, ".1f")
    return [NOTHING if x is None else format(x, f) for x, f in zip(figures, formats, strict=True)]


def _medians(runs: list[dict]) -> list[list[str]]:
    """A line per run: medians over its seeds, but the largest of its gradient norms; failures count as such."""
    lines = []
    for name, same in _by_name(runs).items():
        finished = [run for run in same if "failure" not in run]
        told = f"{name}, {len(finished)} of {len(same)} seeds" if len(finished) < len(same) else f"{name}, {len(same)}"
        if not finished:
            lines.append([told, same[0]["failure"]])
            continue
        *columns, norms = zip(*map(_figures, finished), strict=True)
        middle = [None if None in column else statistics.median(column) for column in columns]
        losses = columns[0]
        lines.append([told, *_shown([*middle, max(norms)]), f"{min(losses):.3f} to {max(losses):.3f}"])
    return lines


def _draw(runs: Mapping[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, run in runs.items():
        left.plot(list(run["on"]), list(run["on"].values()), "o-", label=label)
        drift = {k: v for k, v in run.get("continuous_minus_restarted", {}).items() if int(k.split("-")[0]) >= 256}
        right.plot(list(drift), list(drift.values()), "o-")
    left.set(title="windows of the training length", xlabel="position (bytes)", ylabel="bits per byte")
    right.set(title="read on, minus restarted every 512 bytes", xlabel="position (bytes)", ylabel="bits per byte")
    right.axhline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
