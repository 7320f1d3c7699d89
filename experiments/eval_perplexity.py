"""What is the memory worth, position by position? Memory on, reset at every segment, and never written."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from experiments.framework.experiment import Column, Experiment, Figures, Workplace
from experiments.framework.scales import SCALES, corpus, text_run
from experiments.framework.text import GivenModel, bits_by_position, train_text, validation_streams
from titans.evaluation import MemoryMode
from titans.training import TrainConfig
from titans.training.config import DataSection
from titans.training.data import load_saved_tokenizer

ENDS = (128, 512, 2048, 8192, 32_768, 131_072)
TRAINED: tuple[str, ...] = ("LMM", "MAC")
MODES: dict[MemoryMode, str] = {"on": "memory on", "reset": "reset every segment", "off": "never written"}


class Buckets(BaseModel):
    """A model, given or to be trained, and the streams it reads.

    Args:
        data: the corpus, and the tokens of a stream.
        windows: number of streams.
        model: folder of a saved model; None to train ``run``.
        weights: SHA-256 of that model's weights.
        run: training of the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSection
    windows: int
    model: Path | None = None
    weights: str | None = None
    run: TrainConfig | None = None


def arms(scale: str, data: Path | None = None, model: Path | None = None) -> dict[str, Buckets]:
    """The given model, or an LMM and a MAC to be trained."""
    size = SCALES[scale]
    text = corpus(size, data)
    section = DataSection(**{**text, "length": max(size.lengths)})
    streams = {"data": section, "windows": size.windows}
    if model is None:
        return {name: Buckets(**streams, run=text_run(size, text, name)) for name in TRAINED}
    given = GivenModel.of(model)
    validation_streams(section, section.length, size.windows, load_saved_tokenizer(model))  # what would fail fails now
    return {given.name: Buckets(**streams, model=given.folder, weights=given.weights)}


def unit(settings: Buckets, seed: int, place: Workplace) -> Figures:
    """Bits per byte in every bucket of positions with the memory on, reset and off; trains the model if it must."""
    folder = settings.model if settings.run is None else train_text(settings.run, seed, place)
    assert folder is not None
    ends = [*(end for end in ENDS if end < settings.data.length), settings.data.length]
    figures: Figures = {}
    for mode in MODES:
        curve = bits_by_position(folder, settings.data, settings.data.length, settings.windows, mode)
        for low, high in zip([0, *ends], ends):
            # Entry t is the cost of token t + 1; nothing predicts a stream's first token.
            figures[f"{mode}@{low}-{high}"] = curve[max(low - 1, 0) : high - 1].mean().item()
    return figures


EXPERIMENT = Experiment(
    name="eval-perplexity",
    purpose="Loss by position with the memory on, reset at every segment and never written (--model, or own models).",
    arms=arms,
    unit=unit,
    columns={mode: Column(f"bits per byte, {label}", ".3f", over="tokens") for mode, label in MODES.items()},
    inputs=("data", "model"),
    note="Bits per byte of the tokens at these positions of validation streams. Reset puts the memory's weights back "
    "to their learned start before every segment; attention goes on.",
    by_arm=True,
)
