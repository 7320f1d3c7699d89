"""Experiments: arms that are compared at one of four scales, run unit by unit into a JSON, a table and a picture.

A new experiment is a file here that defines an `Experiment`, and its place in the list below.
"""

from typing import Any

from titans.experiments import (
    ablation,
    collisions,
    eval_perplexity,
    memory_architecture,
    memory_depth,
    miras_variants,
    outliers,
    published,
    shift,
)
from titans.experiments.experiment import Column, Experiment, Figures, Stopped, Workplace
from titans.experiments.report import Report, rich_table
from titans.experiments.runner import plan, run
from titans.experiments.scales import SCALES

EXPERIMENTS: dict[str, Experiment[Any]] = {
    experiment.name: experiment
    for experiment in (
        miras_variants.EXPERIMENT,
        memory_depth.EXPERIMENT,
        memory_architecture.EXPERIMENT,
        ablation.EXPERIMENT,
        published.TRAIN_ENWIK8,
        published.TRAIN_WIKITEXT,
        eval_perplexity.EXPERIMENT,
        outliers.EXPERIMENT,
        collisions.EXPERIMENT,
        shift.EXPERIMENT,
    )
}

__all__ = [
    "Column",
    "EXPERIMENTS",
    "Experiment",
    "Figures",
    "Report",
    "SCALES",
    "Stopped",
    "Workplace",
    "plan",
    "rich_table",
    "run",
]
