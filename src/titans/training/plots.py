"""The pictures of a run, drawn from its metrics file."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def plot_curve(metrics: Path, image: Path) -> None:
    """Draw training loss (each step faint, smoothed bold) and validation loss over steps into a PNG.

    Args:
        metrics: a ``metrics.jsonl`` as `titans.training.callbacks.Metrics` writes it.
        image: the PNG to write.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["eval_loss"], r["eval_bpb"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color="C0", label="training")
    if validation:
        steps, losses, bits = zip(*validation, strict=True)
        axes.plot(steps, losses, "o-", color="C1", markersize=3, label=f"validation ({bits[-1]:.3f} bits per byte)")
    axes.set(xlabel="step", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    figure.savefig(image, dpi=120, format="png")


PANELS = {
    "theta": "step size θ",
    "eta": "momentum decay η",
    "alpha": "forgetting α",
    "half_life": "half-life of each head in tokens",
    "moved": "‖A - A₀‖ / ‖A₀‖",
    "surprise": "surprise ‖g‖",
}
FURTHER_PANELS = ("inner loss: before (dashed), after the write", "outer gradient norm")


def plot_memory(metrics: Path, image: Path) -> None:
    """Draw the `titans.models.MemoryReading` of every layer over the steps, and the outer gradient norms.

    Args:
        metrics: a ``metrics.jsonl`` with probes.
        image: the PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    records = [record for record in read_metrics(metrics) if "memory" in record]
    layers = len(records[0]["memory"]) if records else 0
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    panels = figure.subplots(2, 4).flatten()

    def line(panel: Any, values: Iterable[float | None], **style: Any) -> None:
        points = [(r["step"], value) for r, value in zip(records, values, strict=True) if value is not None]
        if points:
            panel.plot(*zip(*points, strict=True), linewidth=1.2, **style)

    for i in range(layers):
        readings = [record["memory"][i] for record in records]
        colour = colormaps["viridis"](i / layers)
        for panel, name in zip(panels, PANELS, strict=False):
            values = [reading[name] for reading in readings]
            heads = zip(*filter(None, values), strict=True) if name == "half_life" else (values,)
            for head in heads:
                line(panel, head, color=colour, label=f"layer {i}")
        line(panels[6], [reading["loss_before"] for reading in readings], color=colour, linestyle="--")
        line(panels[6], [reading["loss_after"] for reading in readings], color=colour)
    for part in records[0]["gradient_norms"] if records else ():
        line(panels[7], [record["gradient_norms"][part] for record in records], label=part)
    for panel, title in zip(panels, (*PANELS.values(), *FURTHER_PANELS), strict=True):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in (panels[3], panels[5], panels[7]):
        panel.set_yscale("log")
    if layers:
        panels[0].legend(fontsize="small")
        panels[7].legend(fontsize="x-small", ncols=2, loc="best")
    figure.savefig(image, dpi=110, format="png")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start: the first value is itself.

    Args:
        values: the series.
        weight: share of the past in each new mean, in [0, 1).
    """
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
