"""Which memory network? Vector, matrix, MLP and gated MLP (MIRAS §4, axis 1)."""

from pathlib import Path

from experiments.comparisons import COLUMNS, measure
from experiments.framework import SCALES, Experiment
from experiments.framework.scales import Comparison, comparison, corpus, equal_size
from titans.miras import GatedMLP, Matrix, MirasConfig, Vector


def arms(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """The four networks under the steady rule, all of the size of the MLP."""
    size = SCALES[scale]
    text = corpus(size, data)
    # A gated MLP has three maps where an MLP has two.
    networks = [Vector(), Matrix(), size.mlp, GatedMLP(expansion=size.expansion * 2 / 3)]
    found = {network.name: comparison(size, text, "LMM", miras=MirasConfig.steady(network)) for network in networks}
    return equal_size(found, like="mlp")


EXPERIMENT = Experiment(
    name="memory-architecture",
    purpose="Vector, matrix, MLP and gated MLP as the memory of models of equal size.",
    arms=arms,
    unit=measure,
    columns=COLUMNS,
    inputs=("data",),
    note="MLP and gated MLP have equally many memory weights; vector and matrix have a wider feed-forward instead.",
)
