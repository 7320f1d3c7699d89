"""One comparison for every test: relative to the largest entry, tolerance by dtype."""

import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude (at least 1e-3, so zeros compare too)."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-3)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "value", tolerance: float | None = None):
    """Fail when ``actual`` and ``expected`` differ by more than the dtype's tolerance (1e-9 in float64)."""
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    error = relative_error(actual.detach(), expected.detach())
    assert error <= limit, f"{name}: relative error {error:.3e} is above {limit:.1e}"
