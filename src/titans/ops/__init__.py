"""How it is computed: pure tensor functions, a plain reference beside every fast form."""

from titans.ops.attention import causal_attention, segment_attention, sliding_window_attention
from titans.ops.memory import memory_scan
from titans.ops.scan import parallel_scan

__all__ = ["causal_attention", "memory_scan", "parallel_scan", "segment_attention", "sliding_window_attention"]
