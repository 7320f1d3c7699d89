"""What a model's memory is worth, measured."""

from titans.evaluation.perplexity import MemoryMode, nats_by_position

__all__ = ["MemoryMode", "nats_by_position"]
