"""Softmax attention as pure functions: fast forms, their references, and rotary positions."""

from titans.ops.attention.fast import causal_attention, segment_attention, sliding_window_attention
from titans.ops.attention.reference import (
    reference_causal_attention,
    reference_segment_attention,
    reference_sliding_window_attention,
)
from titans.ops.attention.rotary import apply_rotary, rotary_angles

__all__ = [
    "apply_rotary",
    "causal_attention",
    "reference_causal_attention",
    "reference_segment_attention",
    "reference_sliding_window_attention",
    "rotary_angles",
    "segment_attention",
    "sliding_window_attention",
]
