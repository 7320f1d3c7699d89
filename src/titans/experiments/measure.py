"""The figures of an arm: bits per byte on text, accuracy on MQAR, number of parameters."""

from __future__ import annotations

from titans.experiments.experiment import Column, Figures, Workplace
from titans.experiments.models import parameters
from titans.experiments.recall import score_recall, train_recall
from titans.experiments.scales import Comparison
from titans.experiments.text import bits_by_position, train_text

COLUMNS = {
    "bits_per_byte": Column("bits per byte", ".3f", over="length"),
    "mqar_accuracy": Column("MQAR", ".1%", over="length"),
    "parameters": Column("parameters", ",.0f"),
}


def measure(settings: Comparison, seed: int, place: Workplace) -> Figures:
    """Train and measure the text model, then the recall model.

    Bits per byte at length L are over the first L tokens of each stream: the same streams for every L.
    """
    text = settings.text
    folder = train_text(text, seed, place)
    curve = bits_by_position(folder, text.run.data, max(text.lengths), text.windows)
    figures = {f"bits_per_byte@{length}": curve[: length - 1].mean().item() for length in text.lengths}
    if settings.recall is not None:
        model, _ = train_recall(settings.recall, seed, place.say)
        for length in settings.recall.lengths:
            figures[f"mqar_accuracy@{length}"] = score_recall(model, settings.recall, length)
    return {**figures, "parameters": parameters(text.run.model)}
