"""How deep should the memory be? Depth 1 to 4 at equal total size (Titans §5.5)."""

from __future__ import annotations

from pathlib import Path

from titans.experiments.experiment import Experiment
from titans.experiments.measure import COLUMNS, measure
from titans.experiments.scales import SCALES, Comparison, comparison, corpus, equal_size
from titans.miras import MLP, Matrix, MirasConfig


def expansion(depth: int, like: float) -> float:
    """The expansion e at which an MLP of this depth ≥ 2 has the weights of one of depth 2 and expansion ``like``.

    Per head of width D that is 2 e D² + (depth - 2) e² D² = 2 · like · D².
    """
    inner = depth - 2
    return like if not inner else ((1 + 2 * inner * like) ** 0.5 - 1) / inner


def arms(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """Depths 1 to 4 under the steady rule and a sliding window, all of the size of depth 2."""
    size = SCALES[scale]
    text = corpus(size, str(data or "stdlib"))
    found = {}
    for depth in (1, 2, 3, 4):
        network = MLP(depth=depth, expansion=expansion(depth, size.expansion)) if depth > 1 else Matrix()
        found[f"depth-{depth}"] = comparison(size, "LMM", text, miras=MirasConfig.steady(network))
    found["swa"] = comparison(size, "swa", text)
    return equal_size(found, like="depth-2")


EXPERIMENT = Experiment(
    name="memory-depth",
    purpose="Memory networks of depth 1 to 4 at equal total size: text by length, and recall.",
    arms=arms,
    unit=measure,
    columns=COLUMNS,
    inputs=("data",),
    note="Depths 2 to 4 have equally many memory weights: the deeper, the narrower. A matrix (depth 1) has no width of "
    "its own, so its model has a wider feed-forward instead, and so has the sliding window.",
)
