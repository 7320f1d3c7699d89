"""Rotary positions (RoPE, Su et al., 2104.09864), half-split pairs: dimension i turns with dimension i + D // 2."""

import torch
from torch import Tensor


def rotary_angles(
    positions: Tensor, head_dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's rotation.

    The angles are formed in float64 and only then cast: in float32 they are wrong by 0.1 rad at position 2,000,000.

    Args:
        positions: int64 [T] or [B, T], >= 0, of any size.
        head_dim: Head width D >= 1. With an odd D, D // 2 pairs rotate and the last dimension does not.
        base: The slowest pair turns about ``base`` times slower than the first, > 0.
        dtype: Of the result.

    Returns:
        ``(cos, sin)``, each [T, D // 2] or [B, T, D // 2].

    Raises:
        ValueError: ``positions`` has another rank, or head_dim < 1.
    """
    if positions.ndim not in (1, 2):
        raise ValueError(f"positions must be [T] or [B, T], got {list(positions.shape)}")
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    pairs = head_dim // 2
    exact = torch.device("cpu") if positions.device.type == "mps" else positions.device  # which knows no float64
    exponents = torch.arange(pairs, dtype=torch.float64, device=exact) / max(pairs, 1)
    angles = positions[..., None].to(exact).double() * base**-exponents
    return angles.cos().to(dtype).to(positions.device), angles.sin().to(dtype).to(positions.device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their positions' angles.

    Args:
        x: [B, T, H, D]. The last dimension of an odd D passes through.
        cos: From :func:`rotary_angles`, [T, D // 2] or [B, T, D // 2].
        sin: Like ``cos``.

    Returns:
        [B, T, H, D], in the dtype of ``x``.

    Raises:
        ValueError: A shape does not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [B, T, H, D], got {list(x.shape)}")
    B, T, _, D = x.shape
    pairs = D // 2
    for name, value in (("cos", cos), ("sin", sin)):
        if value.shape not in ((T, pairs), (B, T, pairs)):
            raise ValueError(f"{name} must be [{T}, {pairs}] or [{B}, {T}, {pairs}] to fit x, got {list(value.shape)}")
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second, unpaired = x.split([pairs, pairs, D - 2 * pairs], dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), unpaired], dim=-1) if D % 2 else rotated.to(x.dtype)
