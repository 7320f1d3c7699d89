"""The memory as layers: ``NeuralMemory`` and ``PersistentMemory``; they live in `titans.layers`."""

from titans.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans.layers.persistent_memory import PersistentMemory

__all__ = ["NeuralMemory", "NeuralMemoryState", "PersistentMemory"]
