"""What the benchmarks share about this package: which engine runs, and whether it computes the right thing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from harness import BenchmarkError
from torch import Tensor, nn

from titans import NeuralMemory, __version__


def package_versions() -> dict:
    """Version of ours, and whether it is installed or runs from the source tree."""
    try:
        return {"titans-miras": version("titans-miras")}
    except PackageNotFoundError:
        return {"titans-miras": f"{__version__}, source tree"}


@contextmanager
def engine(module: nn.Module, name: str):
    """Every memory in ``module`` runs in this engine meanwhile."""
    memories = [m for m in module.modules() if isinstance(m, NeuralMemory)]
    before = [m.engine for m in memories]
    for memory in memories:
        memory.engine = name
    try:
        yield
    finally:
        for memory, kept in zip(memories, before, strict=True):
            memory.engine = kept


def check_against_reference(
    module: nn.Module, evaluate: Callable[[], tuple[Tensor, ...]], tolerance: float, graph: bool = True
) -> dict:
    """Compare what ``evaluate`` returns now and in the token-by-token reference engine; no agreement, no report.

    Args:
        module: holds the memories whose engine is exchanged.
        evaluate: runs it.
        tolerance: the largest relative difference that passes.
        graph: whether ``evaluate`` needs an autograd graph in the reference engine, which is far slower with one.

    Returns:
        the largest difference relative to the largest entry, and the seconds of the first call, compilation included.
    """
    start = time.perf_counter()
    found = evaluate()
    first = time.perf_counter() - start
    with engine(module, "reference"), torch.set_grad_enabled(graph):
        expected = evaluate()
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise BenchmarkError(f"differs from the reference engine by {error:.1e} (allowed: {tolerance:.0e}); no report")
    return {"error_against_reference": error, "first_call_seconds": first}


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference over all tensors, each relative to its largest entry."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
