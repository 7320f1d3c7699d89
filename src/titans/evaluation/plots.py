"""Pictures of evaluations, saved as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor


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
