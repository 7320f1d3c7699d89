"""How a state's tensors are rounded in a file.

"bfloat16" rounds every tensor but the counts. "int8" does so too, and stores what has rows of at least 16 numbers (the
memories' weights and momentum, caches, open chunks) as 8-bit integers with a scale for every row: x ≈ scale · n, n in
-127..127, an error of at most half a scale, the largest entry of its row over 254.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Dtype = Literal["float32", "bfloat16", "int8"]
SCALE = ".scale"
SHORTEST = 16  # numbers of a row that is worth a scale of its own


def pack(tensors: dict[str, Tensor], dtype: Dtype | None) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors as they are stored, and for those that were rounded the dtype they had; None where none was.

    Raises:
        ValueError: no such dtype, or numbers beyond its range.
    """
    if dtype is not None and dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    if dtype in (None, "float32"):
        return tensors, None
    packed, had = {}, {}
    for name, x in tensors.items():
        if not x.is_floating_point():
            packed[name] = x
            continue
        had[name] = str(x.dtype).removeprefix("torch.")
        if dtype == "int8" and x.dim() > 1 and x.shape[-1] >= SHORTEST:
            scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            packed[name] = (x.float() / scale).round().to(torch.int8)
            packed[name + SCALE] = scale
        else:
            packed[name] = x.to(torch.bfloat16)
        if not unpack_one(packed, name).isfinite().all() and x.isfinite().all():
            raise ValueError(f"dtype: {name} holds numbers beyond the range of {dtype}; None keeps every bit")
    return packed, had


def unpack(tensors: dict[str, Tensor], had: dict[str, str] | None) -> dict[str, Tensor]:
    """Undo `pack` but for the rounding.

    Raises:
        KeyError, TypeError, ValueError: these are no tensors of `pack`.
    """
    if had is None:
        return tensors
    found = {name: x for name, x in tensors.items() if name.removesuffix(SCALE) not in had or name in had}
    for name, told in had.items():
        dtype = getattr(torch, told, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name}: {told!r} is no floating-point dtype")
        found[name] = unpack_one(tensors, name).to(dtype)
    return found


def unpack_one(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A tensor as `pack` stored it, in float32."""
    x = tensors[name].float()
    return x * tensors[name + SCALE] if name + SCALE in tensors else x
