"""The pictures of a run, drawn from its metrics file."""

import json
from pathlib import Path
from typing import Any


def plot_curve(metrics: Path, image: Path) -> None:
    """Draw training loss (each step faint, smoothed bold) and validation loss over steps into a PNG.

    Args:
        metrics: a ``metrics.jsonl`` as `titans.training.callbacks.Metrics` writes it.
        image: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validation = [
        (record["step"], record["eval_loss"], record["eval_bpb"]) for record in records if "eval_loss" in record
    ]

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.84))
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
    "theta": "step size θ", "eta": "momentum decay η", "alpha": "forgetting α",
    "half_life": "half-life of each head in tokens",
    "moved": "‖A - A₀‖ / ‖A₀‖", "surprise": "surprise ‖g‖",
}  # fmt: skip


def plot_memory(metrics: Path, image: Path) -> None:
    """Draw what `titans.models.MemoryReading` says of every layer over the steps, and the outer gradient norms.

    Args:
        metrics: a ``metrics.jsonl`` with probes.
        image: the PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [record for record in read_metrics(metrics) if "memory" in record]
    steps = [record["step"] for record in records]
    layers = len(records[0]["memory"]) if records else 0
    colours = [colormaps["viridis"](i / max(1, layers)) for i in range(layers)]

    def line(axes: Any, values: list[float | None], **style: Any) -> None:
        shown = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), linewidth=1.2, **style)

    figure = Figure(figsize=(14, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4).flatten()
    for panel, (name, title) in zip(axes, PANELS.items(), strict=False):
        for i in range(layers):
            values = [r["memory"][i][name] for r in records]
            if name == "half_life":
                for head in zip(*(v for v in values if isinstance(v, list)), strict=True):
                    line(panel, list(head), color=colours[i])
            else:
                line(panel, values, color=colours[i], label=f"layer {i}")
        panel.set_title(title)
    for i in range(layers):
        line(axes[6], [r["memory"][i]["loss_before"] for r in records], color=colours[i], linestyle="--")
        line(axes[6], [r["memory"][i]["loss_after"] for r in records], color=colours[i])
    axes[6].set_title("inner loss: before (dashed), after the write")
    for part in records[0]["gradient_norms"] if records else ():
        line(axes[7], [r["gradient_norms"][part] for r in records], label=part)
    axes[7].set_title("outer gradient norm")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.set_xlabel("step")
    for panel in (axes[3], axes[5], axes[7]):
        panel.set_yscale("log")
    if layers:
        axes[0].legend(fontsize="small")
        axes[7].legend(fontsize="x-small", ncols=2, loc="best")
    figure.savefig(image, dpi=110, format="png")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: tuple[float, ...] | list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start: the first value is itself.

    Args:
        values: the series.
        weight: share of the past in each new mean, in [0, 1).
    """
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1.0 - weight) * value
        norm = weight * norm + (1.0 - weight)
        smoothed.append(total / norm)
    return smoothed
