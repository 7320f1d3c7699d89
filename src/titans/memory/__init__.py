"""The memory as layers: ``NeuralMemory`` and ``PersistentMemory``."""

from titans.memory.neural_memory import NeuralMemory, NeuralMemoryState, default_heads, default_theta_max
from titans.memory.persistent_memory import PersistentMemory

__all__ = ["NeuralMemory", "NeuralMemoryState", "PersistentMemory", "default_heads", "default_theta_max"]
