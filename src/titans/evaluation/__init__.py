"""What a model's memory is worth, measured."""

from titans.evaluation.perplexity import MemoryMode, nats_by_position
from titans.evaluation.probe import MemoryReading, probe_memories

__all__ = ["MemoryMode", "MemoryReading", "nats_by_position", "probe_memories"]
