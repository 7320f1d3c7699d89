"""The scan over whole chunks in C++: the fastest engine on a CPU, where a C++ compiler is at hand.

It is compiled at its first use, in seconds, into $TITANS_CACHE or ~/.cache/titans. Importing this needs no compiler.
"""

from titans.ops.memory.native.build import available, unavailable
from titans.ops.memory.native.native import run_chunks

__all__ = ["available", "run_chunks", "unavailable"]
