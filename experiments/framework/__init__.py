"""The framework: arms are compared at one of four scales, run unit by unit into a JSON, a table and a picture."""

from experiments.framework.experiment import Column, Experiment, Figures, Stopped, Workplace, load
from experiments.framework.report import Report, markdown
from experiments.framework.runner import plan, run
from experiments.framework.scales import SCALES

__all__ = ["Column", "Experiment", "Figures", "Report", "SCALES", "Stopped", "Workplace"]
__all__ += ["load", "markdown", "plan", "run"]
