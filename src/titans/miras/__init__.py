"""What a memory computes: the four MIRAS choices (arXiv 2504.13173) as small strategy objects."""

from titans.miras.algorithm import Algorithm, GradientDescent, Momentum
from titans.miras.bias import L2, Bias
from titans.miras.config import MirasConfig
from titans.miras.networks import MLP, GatedMLP, Matrix, Network, Vector
from titans.miras.retention import Retention, SphereRetention, WeightDecay

__all__ = [
    "L2",
    "MLP",
    "Algorithm",
    "Bias",
    "GatedMLP",
    "GradientDescent",
    "Matrix",
    "MirasConfig",
    "Momentum",
    "Network",
    "Retention",
    "SphereRetention",
    "Vector",
    "WeightDecay",
]
