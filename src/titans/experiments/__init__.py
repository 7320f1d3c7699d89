"""Experiments: arms that are compared at one of four scales, run unit by unit into a JSON, a table and a picture.

The command knows those listed here by name; others are Python files that define an ``EXPERIMENT``.
"""

from titans.experiments import comparisons, eval_perplexity
from titans.experiments.experiment import Column, Experiment, Figures, Stopped, Workplace, load
from titans.experiments.report import Report, markdown
from titans.experiments.runner import plan, run
from titans.experiments.scales import SCALES

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        comparisons.MIRAS_VARIANTS,
        comparisons.MEMORY_DEPTH,
        comparisons.ABLATION,
        comparisons.TRAIN_ENWIK8,
        comparisons.TRAIN_WIKITEXT,
        eval_perplexity.EXPERIMENT,
    )
}

__all__ = ["Column", "EXPERIMENTS", "Experiment", "Figures", "Report", "SCALES", "Stopped", "Workplace"]
__all__ += ["load", "markdown", "plan", "run"]
