"""The memory operator: ``memory_scan`` with a plain reference and a fast engine."""

from titans.ops.memory.engines import ENGINES, Engine, check_engine, engine_for, pick
from titans.ops.memory.rule import Rule, default_steps
from titans.ops.memory.scan import (
    MemoryTrace,
    initial_weights,
    memory_read,
    memory_scan,
    memory_trace,
    read,
    read_weights,
    scan,
    stored,
)
from titans.ops.memory.state import MemoryState, check_finite
from titans.ops.memory.tokens import Gates, Tokens

__all__ = [
    "ENGINES",
    "Engine",
    "Gates",
    "MemoryState",
    "MemoryTrace",
    "Rule",
    "Tokens",
    "check_engine",
    "check_finite",
    "default_steps",
    "engine_for",
    "initial_weights",
    "memory_read",
    "memory_scan",
    "memory_trace",
    "pick",
    "read",
    "read_weights",
    "scan",
    "stored",
]
