"""Pictures of evaluations, saved as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from titans.evaluation.task import shown_length


def plot_loss_by_position(
    curves: Mapping[str, Tensor], path: str | Path, *, title: str, segment: int | None = None, smooth: int = 65
) -> None:
    """Bits per byte against the position in the stream, one line per setting.

    Args:
        curves: label -> bits per byte [T] of every position.
        path: PNG to write.
        title: above the picture.
        segment: marks the first segment's end with a vertical line.
        smooth: width of the moving average, odd.
    """
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    lowest, highest = [], []
    for label, curve in curves.items():
        width = min(smooth, curve.numel() // 2 * 2 - 1)
        kernel = torch.ones(1, 1, width, dtype=curve.dtype) / width
        averaged = F.conv1d(curve.view(1, 1, -1), kernel).flatten()
        axes.plot(torch.arange(averaged.numel()) + width // 2, averaged, label=label, linewidth=1.6)
        # The first positions, guessed from nothing, would squeeze everything else.
        settled = averaged[averaged.numel() // 20 :]
        lowest.append(settled.min().item())
        highest.append(settled.max().item())
    margin = 0.08 * (max(highest) - min(lowest)) + 1e-3
    axes.set_ylim(min(lowest) - margin, max(highest) + margin)
    if segment is not None:
        axes.axvline(segment, color="grey", linestyle=":", linewidth=1, label="end of the first segment")
    axes.set(title=title, xlabel="position in the stream (bytes)", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(curves) + (segment is not None))
    figure.savefig(path, dpi=120)


def plot_heat_maps(results: Mapping[str, Any], path: str | Path) -> None:
    """Scores as colours: depth against length for tasks with a needle, one panel with a row each for the others.

    Args:
        results: what `titans.evaluation.evaluate` returns, with at least one scored cell.
        path: PNG to write.
    """
    cells = [cell for cell in results["cells"] if "skipped" not in cell and cell["task"] != "ppl"]
    lengths = sorted({cell["length"] for cell in cells})
    panels = _panels(cells, lengths)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    width = max(2.6, 1.4 + 0.62 * len(lengths))
    figure = Figure(figsize=(width * columns + 1.9, 4.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    image = None
    for axes, (title, label, names, values) in zip(grid, panels):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [shown_length(length) for length in lengths])
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, xlabel="length in tokens", ylabel=label)
        for y, x in product(range(len(names)), range(len(lengths))):
            value = values[y][x]
            shown, color = ("–", "black") if math.isnan(value) else (f"{100 * value:.0f}", "w" if value < 0.6 else "k")
            axes.text(x, y, shown, ha="center", va="center", size=8, color=color)
    if image is not None:
        figure.colorbar(image, ax=list(grid), shrink=0.8, pad=0.01, label="accuracy", format=PercentFormatter(1))
    figure.savefig(path, dpi=120, format="png")


def _panels(
    cells: Sequence[dict[str, Any]], lengths: Sequence[int]
) -> list[tuple[str, str, list[str], list[list[float]]]]:
    """Title, label of the rows, their names, and scores by row and length; nan where there is none."""
    panels = []
    for task in dict.fromkeys(cell["task"] for cell in cells if "by_depth" in cell):
        columns = {cell["length"]: cell["by_depth"] for cell in cells if cell["task"] == task}
        depths = sorted({depth for column in columns.values() for depth in column}, key=float)
        values = [[columns.get(length, {}).get(depth, math.nan) for length in lengths] for depth in depths]
        panels.append((task, "depth of the needle", [f"{float(depth):.0%}" for depth in depths], values))
    others = list(dict.fromkeys(cell["task"] for cell in cells if "by_depth" not in cell))
    if others:
        scores = {(cell["task"], cell["length"]): cell["score"] for cell in cells}
        values = [[scores.get((task, length), math.nan) for length in lengths] for task in others]
        panels.append(("tasks without one needle", "", others, values))
    return panels


def plot_accuracy_by_state(runs: Mapping[str, Mapping[str, Any]], task: str, path: str | Path) -> None:
    """Accuracy against the bytes of state that a stream carries, one line a length with a dot for every model.

    Args:
        runs: label -> what `titans.evaluation.evaluate` returned or results.json holds.
        task: such as "mqar_zoology".
        path: PNG to write.

    Raises:
        ValueError: no run has measured this task.
    """
    points: dict[int, list[tuple[float, float, str]]] = {}
    for label, run in runs.items():
        for cell in run["cells"]:
            if cell["task"] == task and "score" in cell:
                points.setdefault(cell["length"], []).append((cell["state_bytes"], cell["score"], label))
    if not points:
        raise ValueError(f"task: no run has measured {task!r}")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for length in sorted(points):
        states, scores, _ = zip(*sorted(points[length]), strict=True)
        axes.plot(states, scores, marker="o", label=f"{shown_length(length)} tokens", linewidth=1.2, alpha=0.8)
    highest: dict[str, tuple[float, float]] = {}
    for state, score, label in (point for found in points.values() for point in found):
        highest[label] = max(highest.get(label, (state, -1.0)), (state, score), key=lambda at: at[1])
    for label, at in highest.items():
        axes.annotate(label, at, (0, 7), textcoords="offset points", size=8, ha="center")
    axes.set_xscale("log", base=2)
    axes.margins(x=0.12)
    axes.set(title=task, xlabel="bytes of state per stream", ylabel="accuracy", ylim=(-0.05, 1.12))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=120, format="png")
