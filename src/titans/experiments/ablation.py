"""What is each part of the LMM worth? The rows of Titans Table 5, and our additions."""

from __future__ import annotations

from pathlib import Path

from titans.experiments.experiment import Experiment
from titans.experiments.measure import COLUMNS, measure
from titans.experiments.scales import SCALES, Comparison, corpus, text_task
from titans.miras import GradientDescent, Matrix, MirasConfig, SphereRetention

# Perplexity on text, Titans Table 5.
PAPER = {
    "LMM": "27.01",
    "linear-memory": "28.49 (+1.48)",
    "no-convolution": "28.73 (+1.72)",
    "no-momentum": "28.98 (+1.97)",
    "no-forgetting": "29.04 (+2.03)",
    "no-persistent": "27.63 (+0.62)",
}


def arms(scale: str, data: Path | None = None) -> dict[str, Comparison]:
    """The LMM, and the LMM with one change; sizes are as they come."""
    size = SCALES[scale]
    text = corpus(size, str(data or "stdlib"))
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
    found = {}
    for name, change in changes.items():
        task = text_task(size, "LMM", text, **{"miras": rule, **change})
        found[name] = Comparison(text=task.model_copy(update={"lengths": (size.length,)}))
    return found


EXPERIMENT = Experiment(
    name="ablation",
    purpose="An LMM with the Titans rule after removing one part: the rows of Titans Table 5, the LN wrapper, sphere.",
    arms=arms,
    unit=measure,
    columns=COLUMNS,
    inputs=("data",),
    beside={"Titans Table 5: perplexity": PAPER},
    note="Only the order can be compared: the paper's figures are perplexities per token of a 32K vocabulary at a "
    "scale of its own, ours are bits per byte. Nothing makes up for a removed part's parameters. The paper has no row "
    "without the LN wrapper M(x) = x + LN(f(x)) and none with norm-preserving retention (sphere).",
)
