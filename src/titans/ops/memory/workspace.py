"""Large scratch memory that stays warm between calls.

A page that the system hands out for the first time costs several times what the arithmetic on it does, and a training
step asks for the same sizes again and again. So on the CPU blocks go back to a list when the last tensor over them is
gone, whoever held it, and the next call takes them from there. Other devices have allocators that do the same.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

IDLE_LIMIT = 1 << 30  # bytes of unused blocks that are kept
ALIGNMENT = 64  # bytes, a cache line
_idle: list[mmap.mmap] = []


def borrow(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised flat tensor of ``numel`` elements, from warm memory where there is any."""
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    size = max(1, numel) * dtype.itemsize
    block = _take(size)
    view = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.from_numpy(view)[: numel * dtype.itemsize].view(dtype)


def release() -> None:
    """Return all unused blocks to the system."""
    _idle.clear()


class Layout:
    """Named tensors inside one flat block.

    Args:
        shapes: per name its shape.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], itemsize: int):
        self.shapes = dict(shapes)
        step = ALIGNMENT // itemsize
        self.sizes = {name: -(-prod(shape) // step) * step for name, shape in self.shapes.items()}
        self.numel = sum(self.sizes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors over a block of at least ``numel`` elements."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            found[name] = flat[start : start + prod(shape)].view(tuple(shape))
            start += self.sizes[name]
        return found


def _take(size: int) -> mmap.mmap:
    """An unused block of at least ``size`` bytes and at most twice that, else a new one."""
    fitting = [b for b in list(_idle) if size <= len(b) <= 2 * size]
    for block in sorted(fitting, key=len):
        try:
            _idle.remove(block)
        except ValueError:  # another thread took it
            continue
        return block
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # the default is shared with forked workers
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    """Keep the block; the blocks that have waited longest make room for it."""
    _idle.append(block)
    while sum(map(len, list(_idle))) > IDLE_LIMIT:
        try:
            _idle.pop(0)
        except IndexError:  # another thread took the last one
            return
