"""Which memory rule? The five named rules in one model, beside attention of equal size."""

from __future__ import annotations

from pathlib import Path

from titans.experiments.experiment import Experiment
from titans.experiments.measure import COLUMNS, measure
from titans.experiments.scales import SCALES, Comparison, comparison, corpus, equal_size
from titans.miras import MirasConfig
from titans.miras.config import PRESETS
from titans.models.config import Variant

BASELINES: tuple[Variant, ...] = ("swa", "transformer")


def arms(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """The five rules with the scale's MLP, and the baselines, all of the size of the first."""
    size = SCALES[scale]
    text = corpus(size, str(data or "stdlib"))
    found = {}
    for name in PRESETS:
        rule = getattr(MirasConfig, name)(architecture=size.mlp)
        found[name] = comparison(size, "LMM", text, miras=rule)
    for variant in BASELINES:
        found[variant] = comparison(size, variant, text)
    return equal_size(found, like="titans")


EXPERIMENT = Experiment(
    name="miras-variants",
    purpose="Titans, steady, YAAD, MONETA and MEMORA in an otherwise equal LMM, against attention of equal size.",
    arms=arms,
    unit=measure,
    columns=COLUMNS,
    inputs=("data",),
)
