"""Training on enwik8 and WikiText-103, from a local copy or downloaded: MAC beside attention of equal size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from titans.data import TokenDocuments
from titans.experiments.experiment import Column, Experiment, Figures, Workplace
from titans.experiments.measure import COLUMNS, measure
from titans.experiments.scales import SCALES, Comparison, corpus, equal_size, text_task
from titans.experiments.text import validation_texts
from titans.models.config import Variant
from titans.training.data import load_tokenizer

VARIANTS: tuple[Variant, ...] = ("MAC", "swa", "transformer")
# What a user may name: the folder that titans.data looks into, or the file or folder in it.
ENWIK8 = ("enwik8", "enwik8.zip")
WIKITEXT = ("wikitext-103-raw", "wikitext-103", "wikitext-103-raw-v1.zip", "wikitext-103-v1.zip")


def arms_on(source: str, names: tuple[str, ...]) -> Callable[..., dict[str, Comparison]]:
    """The function ``arms`` of the experiment on a published corpus whose copy has one of these names."""

    def arms(scale: str, data: Path | None = None) -> dict[str, Comparison]:
        if data is not None and data.name in names:
            data = data.parent
        elif data is not None and not any((data / name).exists() for name in names):
            raise ValueError(f"--data: {data} neither is nor holds {' or '.join(names)}")
        size = SCALES[scale]
        text = corpus(size, source, None if data is None else str(data))
        found = {variant: Comparison(text=text_task(size, variant, text)) for variant in VARIANTS}
        return equal_size(found, like="MAC")

    return arms


def measure_words(settings: Comparison, seed: int, place: Workplace) -> Figures:
    """As `measure`, with the perplexity per word that each loss means: exp(total nats / number of words).

    Words are what white space separates, and every line's end is one more, as WikiText counts. The total is the loss
    per byte of the measured streams times the bytes of the split, so it does not depend on the tokenizer.
    """
    figures = measure(settings, seed, place)
    data = settings.text.run.data
    texts = validation_texts(data)
    words = sum(len(text.split()) + text.count("\n") for text in texts)
    nats_per_bit = math.log(2) * TokenDocuments.from_texts(texts, load_tokenizer(data.tokenizer)).bytes / words
    perplexities = {
        name.replace("bits_per_byte", "word_perplexity"): math.exp(bits * nats_per_bit)
        for name, bits in figures.items()
        if name.startswith("bits_per_byte")
    }
    return {**figures, **perplexities}


TRAIN_ENWIK8 = Experiment(
    name="train-enwik8",
    purpose="MAC, sliding window and transformer of equal size on enwik8: bits per byte of its validation split.",
    arms=arms_on("enwik8", ENWIK8),
    unit=measure,
    columns=COLUMNS,
    inputs=("data",),
    note="Validation is the 5 MB after the first 90 MB.",
)
TRAIN_WIKITEXT = Experiment(
    name="train-wikitext",
    purpose="MAC, sliding window and transformer of equal size on WikiText-103: bits per byte and word perplexity.",
    arms=arms_on("wikitext-103", WIKITEXT),
    unit=measure_words,
    columns={**COLUMNS, "word_perplexity": Column("word perplexity", ",.1f", over="length")},
    inputs=("data",),
    note="Word perplexity is exp(total nats / number of words); words are separated by white space, and every line's "
    "end counts as one, as in WikiText's own counts. The models read bytes.",
)
