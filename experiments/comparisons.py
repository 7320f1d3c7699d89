"""The experiments that train arms on text, and on recall, and put them side by side."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments.framework.experiment import Column, Experiment, Figures, Workplace
from experiments.framework.recall import score_recall, train_recall
from experiments.framework.scales import SCALES, Comparison, comparison, corpus, equal_size, parameters
from experiments.framework.text import bits_by_position, train_text, validation_texts
from titans.data import TokenDocuments
from titans.miras import MLP, GradientDescent, Matrix, MirasConfig, SphereRetention
from titans.miras.config import PRESETS
from titans.training.data import load_tokenizer

COLUMNS = {
    "bits_per_byte": Column("bits per byte", ".3f", over="length"),
    "mqar_accuracy": Column("MQAR", ".1%", over="length"),
    "parameters": Column("parameters", ",.0f", drawn=False),  # what the arms share
}


def measure(settings: Comparison, seed: int, place: Workplace) -> Figures:
    """Train and measure the text model, then the recall model.

    Bits per byte at length L are over the first L tokens of each stream: the same streams for every L.
    """
    folder = train_text(settings.text, seed, place)
    curve = bits_by_position(folder, settings.text.data, max(settings.lengths), settings.windows)
    figures = {f"bits_per_byte@{length}": curve[: length - 1].mean().item() for length in settings.lengths}
    if settings.recall is not None:
        model, place.raw["mqar"] = train_recall(settings.recall, seed, place.say)
        for length in settings.recall.lengths:
            figures[f"mqar_accuracy@{length}"] = score_recall(model, settings.recall, length)
    return {**figures, "parameters": parameters(settings.text.model)}


def measure_words(settings: Comparison, seed: int, place: Workplace) -> Figures:
    """As `measure`, with the perplexity per word that each loss means: exp(total nats / number of words).

    Words are what white space separates, and every line's end is one more, as WikiText counts. The total is the loss
    per byte of the measured streams times the bytes of the split, so it does not depend on the tokenizer.
    """
    figures = measure(settings, seed, place)
    texts = validation_texts(settings.text.data)
    words = sum(len(text.split()) + text.count("\n") for text in texts)
    tokenizer = load_tokenizer(settings.text.data.tokenizer)
    nats_per_bit = math.log(2) * TokenDocuments.from_texts(texts, tokenizer).bytes / words
    for length in settings.lengths:
        figures[f"word_perplexity@{length}"] = math.exp(figures[f"bits_per_byte@{length}"] * nats_per_bit)
    return figures


def rules(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """The five named rules with the scale's MLP, and the baselines, all of the size of the first."""
    size = SCALES[scale]
    arm = partial(comparison, size, corpus(size, data))
    presets = {name: getattr(MirasConfig, name)(architecture=size.mlp) for name in PRESETS}
    found = {name: arm("LMM", miras=rule) for name, rule in presets.items()}
    return equal_size({**found, "swa": arm("swa"), "transformer": arm("transformer")}, like="titans")


def depths(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """Depths 1 to 4 under the steady rule and a sliding window, all of the size of depth 2."""
    size = SCALES[scale]
    arm, found = partial(comparison, size, corpus(size, data)), {}
    for depth in (1, 2, 3, 4):
        network = MLP(depth=depth, expansion=expansion(depth, size.expansion)) if depth > 1 else Matrix()
        found[f"depth-{depth}"] = arm("LMM", miras=MirasConfig.steady(network))
    return equal_size({**found, "swa": arm("swa")}, like="depth-2")


def expansion(depth: int, like: float) -> float:
    """The expansion e at which an MLP of this depth ≥ 2 has the weights of one of depth 2 and expansion ``like``.

    Per head of width D that is 2 e D² + (depth - 2) e² D² = 2 · like · D².
    """
    inner = depth - 2
    return like if not inner else ((1 + 2 * inner * like) ** 0.5 - 1) / inner


def parts(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """The LMM, and the LMM with one change; sizes are as they come."""
    size = replace(SCALES[scale], lengths=SCALES[scale].lengths[:1])
    text = corpus(size, data)
    rule = MirasConfig.titans(architecture=size.mlp)
    unwrapped = size.mlp.model_copy(update={"residual_norm": False})
    changes = {
        "LMM": {},
        "linear-memory": {"miras": MirasConfig.titans(architecture=Matrix())},
        "no-convolution": {"conv_kernel": 0},
        "no-momentum": {"miras": rule.model_copy(update={"algorithm": GradientDescent()})},
        "no-forgetting": {"use_decay": False},
        "no-persistent": {"n_persistent": 0},
        "no-norm-wrapper": {"miras": rule.model_copy(update={"architecture": unwrapped})},
        "sphere": {"miras": rule.model_copy(update={"retention": SphereRetention()})},
    }
    return {
        name: comparison(size, text, "LMM", recall=False, **{"miras": rule, **change})
        for name, change in changes.items()
    }


def published(source: str, names: tuple[str, ...]) -> Callable[..., dict[str, Comparison]]:
    """The arms on a published corpus; ``data`` is the folder that titans.data looks into, or one of ``names`` in it."""

    def arms(scale: str, data: Path | None = None) -> dict[str, Comparison]:
        if data is not None and data.name in names:
            data = data.parent
        elif data is not None and not any((data / name).exists() for name in names):
            raise ValueError(f"--data: {data} neither is nor holds {' or '.join(names)}")
        size = SCALES[scale]
        text = corpus(size, source, data)
        variants: tuple[str, ...] = ("MAC", "swa", "transformer")
        return equal_size({variant: comparison(size, text, variant, recall=False) for variant in variants}, like="MAC")

    return arms


compared = partial(Experiment, unit=measure, columns=COLUMNS, inputs=("data",))
MIRAS_VARIANTS = compared(
    name="miras-variants",
    purpose="Titans, steady, YAAD, MONETA and MEMORA in an otherwise equal LMM, against attention of equal size.",
    arms=rules,
)
MEMORY_DEPTH = compared(
    name="memory-depth",
    purpose="Memory networks of depth 1 to 4 at equal total size: text by length, and recall.",
    arms=depths,
    note="Depths 2 to 4 have equally many memory weights: the deeper, the narrower. A matrix (depth 1) has no width of "
    "its own, so its model has a wider feed-forward instead, and so has the sliding window.",
)
ABLATION = compared(
    name="ablation",
    purpose="An LMM with the Titans rule after removing one part: the rows of Titans Table 5, the LN wrapper, sphere.",
    arms=parts,
    note="Titans Table 5 has perplexities: LMM 27.01, linear memory 28.49, no convolution 28.73, no momentum 28.98, no "
    "forgetting 29.04, no persistent 27.63. Only the order can be compared: the paper's are per token of a 32K "
    "vocabulary at a scale of its own, ours are bits per byte. Nothing makes up for a removed part's parameters. The "
    "paper has no row without the LN wrapper M(x) = x + LN(f(x)) and none with norm-preserving retention (sphere).",
)
TRAIN_ENWIK8 = compared(
    name="train-enwik8",
    purpose="MAC, sliding window and transformer of equal size on enwik8: bits per byte of its validation split.",
    arms=published("enwik8", ("enwik8", "enwik8.zip")),
    note="Validation is the 5 MB after the first 90 MB.",
)
TRAIN_WIKITEXT = compared(
    name="train-wikitext",
    purpose="MAC, sliding window and transformer of equal size on WikiText-103: bits per byte and word perplexity.",
    arms=published(
        "wikitext-103", ("wikitext-103-raw", "wikitext-103", "wikitext-103-raw-v1.zip", "wikitext-103-v1.zip")
    ),
    unit=measure_words,
    columns={**COLUMNS, "word_perplexity": Column("word perplexity", ",.1f", over="length")},
    note="Word perplexity is exp(total nats / number of words); words are separated by white space, and every line's "
    "end counts as one, as in WikiText's own counts. The models read bytes.",
)
