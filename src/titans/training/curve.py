"""The picture of a run, drawn from its metrics file."""

import json
from pathlib import Path


def plot_curve(metrics: Path, image: Path) -> None:
    """Draw training loss (each step faint, smoothed bold) and validation loss over steps into a PNG.

    Args:
        metrics: a ``metrics.jsonl`` as `titans.training.callbacks.Metrics` writes it.
        image: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
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
