"""A few vectors through what lies around a memory's step, in C++: linear maps, norms, a feed-forward layer, attention.

All tensors are contiguous, on the CPU and of one dtype, float32 or float64 (`usable` says so of the vectors).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.memory.native.build import library, unavailable

ROWS = 4  # vectors of a call up to which linear maps beat BLAS at every width (benchmarks/vectors.py)


def usable(x: Tensor) -> bool:
    """May C++ take the vectors x [B, 1, width]: without gradients, autocast, a graph, or a tensor of another kind?"""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        and unavailable() is None
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, of x [..., in] and W [out, in]."""
    out, width = weight.shape
    y = x.new_empty(*x.shape[:-1], out)
    _vectors(0, (x.numel() // width, width, out), 0.0, y, x, weight, bias)
    return y


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · scale, of x [..., width]."""
    y = torch.empty_like(x)
    _vectors(1, (x.numel() // len(scale), len(scale), 0), eps, y, x, scale)
    return y


def feedforward(x: Tensor, scale: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """x + down (SiLU(gate) ⊙ value) of x [..., width], with [gate, value] = up (x / RMS(x) · scale)."""
    width, hidden = down.shape
    y = torch.empty_like(x)
    _vectors(2, (x.numel() // width, width, hidden), eps, y, x, scale, up, down)
    return y


@dataclass(frozen=True)
class AttendToken:
    """What attention makes of one token x [B, 1, d_model], d = d_model.

    Attributes:
        projected: q, k and v before the convolution, [B, 1, 3 d].
        tail, conv: the convolution's last inputs [B, K-1, 3 d] and its weights [K, 3 d]; None without one.
        beside: key and value of a vector that is no token of the stream, [B, 1, 2 d].
        cos, sin: of the token's position, [B, 1, D / 2].
    """

    projected: Tensor
    tail: Tensor | None
    conv: Tensor | None
    beside: Tensor | None
    cos: Tensor
    sin: Tensor


def attend(
    token: AttendToken, cache: Tensor, circle: int, column: Tensor, hidden: Tensor, active: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Put a token into a cache and attend to what is there, as `titans.layers.decoding.attend` does.

    Args:
        token: in the cache's dtype.
        cache: contiguous [B, H, P + W, 2·D], written into: after P columns that every token sees come ``circle``
            columns for the vectors beside, if there are such, and ``circle`` for the tokens.
        column: the token's column of its circle, int64 [B, 1].
        hidden: bool [B, 1, 1, P + W], True for columns that are not seen.
        active: bool [B], False for rows that take no token.

    Returns:
        [B, 1, d], and the convolution's new tail.
    """
    batch, heads, columns, pair = cache.shape
    fixed = columns - circle * (1 if token.beside is None else 2)
    out = cache.new_empty(batch, 1, heads * pair // 2)
    tail = None if token.tail is None else torch.empty_like(token.tail, memory_format=torch.contiguous_format)
    conv = token.conv
    shape = (
        batch,
        heads,
        pair // 2,
        columns,
        fixed,
        circle,
        1 if conv is None else len(conv),
        token.beside is not None,
    )
    given = [None if x is None else x.contiguous() for x in vars(token).values()]
    rest = [None if x is None else x.contiguous() for x in (column, hidden, active)]
    sizes, places = pack(shape, (*given, cache, out, tail, *rest))
    check(library().titans_attend(sizes, places, cache.dtype == torch.float64, torch.get_num_threads()))
    return out, tail


def pack(sizes: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> tuple[ctypes.Array, ctypes.Array]:
    """Sizes, and where the tensors lie, as C++ takes them. All that it is given goes through here, for it believes that
    a call's numbers are of one dtype.

    Raises:
        RuntimeError: they are of several, or neither float32 nor float64.
    """
    dtypes = {x.dtype for x in tensors if x is not None} - {torch.int64, torch.bool}  # counts and flags
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = " and ".join(sorted(map(str, dtypes)))
        raise RuntimeError(f"native code computes in torch.float32 or torch.float64 alone, got tensors of {found}")
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    return (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_void_p * len(pointers))(*pointers)


def check(failed: int) -> None:
    """Raise a RuntimeError if C++ had no memory."""
    if failed:
        raise RuntimeError("the native engine got no memory for its scratch space")


def _vectors(what: int, sizes: tuple[int, ...], eps: float, *tensors: Tensor | None) -> None:
    numbers, places = pack(sizes, tensors)
    double = tensors[0].dtype == torch.float64  # type: ignore[union-attr]
    check(library().titans_vectors(numbers, eps, places, double, what, torch.get_num_threads()))
