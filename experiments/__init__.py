"""Experiments and studies. The command knows those listed here by name, the other files by their paths."""

from experiments import babilong, comparisons, eval_perplexity, scaling_analysis
from experiments.framework import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        comparisons.MIRAS_VARIANTS,
        comparisons.MEMORY_DEPTH,
        comparisons.ABLATION,
        comparisons.TRAIN_ENWIK8,
        comparisons.TRAIN_WIKITEXT,
        eval_perplexity.EXPERIMENT,
        babilong.EXPERIMENT,
        scaling_analysis.EXPERIMENT,
    )
}
