"""Which engine computes a memory: their names, what each knows, and the fastest that is exact for a rule and a device.

An engine is a function ``(rule, tokens, state, rows, *, traced=False) -> Scanned`` in the layout [G, T, ...]. The fast
ones know few rules and nothing but runs of whole chunks; all else the general engine's loop does around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch

from titans.miras import MirasConfig
from titans.names import unknown
from titans.ops.memory import fused, native
from titans.ops.memory.chunk_rule import unsupported
from titans.ops.memory.chunked import Scanned, chunked_scan
from titans.ops.memory.reference import reference_scan

Engine = Literal["auto", "native", "fused", "chunked", "compiled", "reference"]
Scan = Callable[..., Scanned]
ENGINES: dict[str, Scan] = {
    "native": partial(chunked_scan, run=native.run_chunks),
    "fused": partial(chunked_scan, run=fused.run_chunks),  # type: ignore[arg-type]
    "chunked": chunked_scan,
    "compiled": partial(chunked_scan, compiled=True),
    "reference": reference_scan,
}


def check_engine(engine: str) -> None:
    """Raise a ValueError unless ``engine`` is one."""
    if engine not in get_args(Engine):
        raise ValueError(unknown("engine", engine, get_args(Engine)))


def pick(engine: str, miras: MirasConfig, device: torch.device) -> tuple[str, str]:
    """The engine that ``engine`` means for a rule on a device, and why.

    "auto" is the fastest one that is exact there; a named one is that one or an error.

    Raises:
        ValueError: no such engine, or the one named does not know the rule, the device or the machine.
    """
    check_engine(engine)
    if engine not in ("auto", "native", "fused"):
        return engine, "asked for"
    reason = unsupported(miras)
    against = {"fused": reason, "native": reason}
    if reason is None and device.type != "cpu":
        against["native"] = f"it computes on the CPU, not on {device.type}"
    elif reason is None:
        against["native"] = native.unavailable()
    if engine != "auto":
        if against[engine] is not None:
            raise ValueError(f"engine {engine!r} cannot be used: {against[engine]}")
        return engine, "asked for"
    if against["native"] is None:
        return "native", "compiled for this processor, and exact for this rule"
    if against["fused"] is None:
        return "fused", f"exact for this rule; native: {against['native']}"
    return "chunked", f"it knows every rule; native and fused: {reason}"


def engine_for(engine: str, miras: MirasConfig, device: torch.device) -> Scan:
    """`pick`'s engine."""
    return ENGINES[pick(engine, miras, device)[0]]
