"""Titans (arXiv 2501.00663) and MIRAS (arXiv 2504.13173): sequence models that learn to memorise while they read."""

from titans.memory import NeuralMemory, PersistentMemory
from titans.miras import MirasConfig
from titans.models import (
    ModelState,
    TitansConfig,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TitansModel,
    build_model,
    count_parameters,
    load_memory,
    load_model,
)

__version__ = "0.1.0"

__all__ = [
    "MirasConfig",
    "ModelState",
    "NeuralMemory",
    "PersistentMemory",
    "TitansConfig",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansModel",
    "build_model",
    "count_parameters",
    "load_memory",
    "load_model",
]
