"""Tables of docs/results/lasting.md from the runs of lasting.py.

``python benchmarks/lasting_report.py docs/results/raw/lasting``: one line per run and seed, bits per byte.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/raw/lasting")
    wanted = sys.argv[2:]
    columns = f"{'run':42s} {'train':>6s} {'beyond':>6s} {'reset':>6s} {'off':>6s}"
    print(f"{columns} | {'drift by position':31s} | mean | gradient")
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if wanted and not any(word in run["name"] for word in wanted):
            continue
        print(_line(run, path.stem))
    return 0


def _line(run: dict, name: str) -> str:
    if "failure" in run:
        return f"{name:42s} {run['failure'][:90]}"
    on = run.get("beyond_window_on")
    cells = [run["final_loss"], on]
    cells += [None if on is None or (x := run.get(f"beyond_window_{m}")) is None else x - on for m in ("reset", "off")]
    shown = " ".join(f"{'':>6s}" if c is None else f"{c:6.3f}" for c in cells)
    drift = list(run.get("continuous_minus_restarted", {}).values())[4:]
    mean = run["continuous_mean"] - run["restarted_mean"] if drift else 0
    drifts = " ".join(f"{d:+.3f}" for d in drift)
    return f"{name:42s} {shown} | {drifts:31s} | {mean:+.3f} | {run['largest_gradient_norm']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
