"""What a memory computes: the four MIRAS choices (arXiv 2504.13173) as small strategy objects."""

import importlib
import pkgutil

from titans.miras.algorithm import Algorithm, GradientDescent, Momentum, Muon
from titans.miras.bias import L2, Bias, ErrorSignal, Huber, Lp, Robust
from titans.miras.config import MirasConfig
from titans.miras.networks import MLP, Apply, GatedMLP, Matrix, Network, Vector
from titans.miras.retention import (
    AnchoredRetention,
    ElasticNet,
    KLRetention,
    LqRetention,
    Retention,
    SigmoidRetention,
    SphereRetention,
    WeightDecay,
)

__all__ = [
    "L2",
    "MLP",
    "Algorithm",
    "AnchoredRetention",
    "Apply",
    "Bias",
    "ElasticNet",
    "ErrorSignal",
    "GatedMLP",
    "GradientDescent",
    "Huber",
    "KLRetention",
    "LqRetention",
    "Lp",
    "Matrix",
    "MirasConfig",
    "Momentum",
    "Muon",
    "Network",
    "Retention",
    "Robust",
    "SigmoidRetention",
    "SphereRetention",
    "Vector",
    "WeightDecay",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # a new file here is found by itself
