"""What is the memory worth, position by position? Memory on, reset at every segment, and never written."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from titans.evaluation import MemoryMode
from titans.experiments.experiment import Column, Experiment, Figures, Workplace
from titans.experiments.report import Summary
from titans.experiments.scales import SCALES, corpus, text_task
from titans.experiments.text import TextTask, bits_by_position, train_text, validation_streams
from titans.models import load_model
from titans.models.config import Variant
from titans.training.config import DataSection
from titans.training.data import load_saved_tokenizer

ENDS = (128, 512, 2048, 8192, 32_768, 131_072)
TRAINED: tuple[Variant, ...] = ("LMM", "MAC")
MODES: dict[MemoryMode, str] = {"on": "memory on", "reset": "reset every segment", "off": "never written"}


class Buckets(BaseModel):
    """A model, given or to be trained, and the streams it reads.

    Args:
        data: the corpus.
        length: tokens of a stream.
        windows: number of streams.
        model: folder of a saved model; None to train ``task``.
        weights: SHA-256 of that model's weights.
        task: the model to train.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSection
    length: int
    windows: int
    model: Path | None = None
    weights: str | None = None
    task: TextTask | None = None


def arms(scale: str, data: Path | None = None, model: Path | None = None) -> dict[str, Buckets]:
    """The given model, or an LMM and a MAC to be trained."""
    size = SCALES[scale]
    text = corpus(size, str(data or "stdlib"))
    length = max(size.lengths)
    streams = {"data": DataSection(**text, length=length), "length": length, "windows": size.windows}
    if model is None:
        return {name: Buckets(**streams, task=text_task(size, name, text)) for name in TRAINED}
    _check_model(model, **streams)
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", model.resolve().name)
    return {name: Buckets(**streams, model=model.resolve(), weights=weights)}


def _check_model(folder: Path, data: DataSection, length: int, windows: int) -> None:
    """Raise ValueError or OSError now for what would fail when the model reads."""
    tokenizer, vocabulary = load_saved_tokenizer(folder), load_model(folder).config.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(f"--model: its tokenizer has {tokenizer.vocab_size} ids, the model knows {vocabulary}")
    validation_streams(data, length, windows, tokenizer)


def unit(settings: Buckets, seed: int, place: Workplace) -> Figures:
    """Bits per byte in every bucket of positions with the memory on, reset and off; trains the model if it must."""
    folder = settings.model
    if settings.task is not None:
        folder = train_text(settings.task, seed, place)
    assert folder is not None
    ends = [*(end for end in ENDS if end < settings.length), settings.length]
    figures: Figures = {}
    for mode in MODES:
        curve = bits_by_position(folder, settings.data, settings.length, settings.windows, mode)
        for low, high in zip([0, *ends], ends):
            # Entry t is the cost of token t + 1; nothing predicts a stream's first token.
            figures[f"{mode}@{low}-{high}"] = curve[max(low - 1, 0) : high - 1].mean().item()
    return figures


def plot(figure: Figure, experiment: Experiment, summary: Summary) -> None:
    """A panel for every model, a line for every mode of its memory over the buckets."""
    figure.set_size_inches(5.2 * len(summary), 3.9)
    for place, (arm, figures) in enumerate(summary.items()):
        axes = figure.add_subplot(1, len(summary), place + 1)
        for mode, label in MODES.items():
            found = {name.partition("@")[2]: spread for name, spread in figures.items() if name.startswith(f"{mode}@")}
            middle = [spread.median for spread in found.values()]
            reach = [[s.median - s.low for s in found.values()], [s.high - s.median for s in found.values()]]
            axes.errorbar(list(found), middle, reach, marker="o", ms=5, lw=1.4, capsize=3, label=label)
        axes.set(title=arm, xlabel="position in the stream (tokens)", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="eval-perplexity",
    purpose="Loss by position with the memory on, reset at every segment and never written (--model, or own models).",
    arms=arms,
    unit=unit,
    columns={mode: Column(label, ".3f", over="tokens") for mode, label in MODES.items()},
    inputs=("data", "model"),
    note="Bits per byte of the tokens at these positions of validation streams. Reset puts the memory's weights back "
    "to their learned start before every segment; attention goes on.",
    figures_down=True,
    plot=plot,
)
