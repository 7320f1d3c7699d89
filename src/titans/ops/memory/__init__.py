"""The memory operator: ``memory_scan`` with a plain reference and a fast engine."""

from titans.ops.memory.scan import (
    Engine,
    MemoryTrace,
    check_engine,
    default_steps,
    memory_read,
    memory_scan,
    memory_start,
    memory_trace,
)
from titans.ops.memory.state import MemoryState, State

__all__ = [
    "Engine",
    "MemoryState",
    "MemoryTrace",
    "State",
    "check_engine",
    "default_steps",
    "memory_read",
    "memory_scan",
    "memory_start",
    "memory_trace",
]
