"""The associative scan against its loop, with gates at the edges of their range."""

import pytest
import torch

from helpers import assert_close
from titans.ops.scan import parallel_scan, reference_scan

B, D = 2, 3


def make_inputs(T, gate_width=D, seed=0):
    """Gates of which about a third each are exactly 0, exactly 1 and in between; inputs; an initial state."""
    generator = torch.Generator().manual_seed(seed)
    gates = (3 * torch.rand(B, T, gate_width, generator=generator, dtype=torch.float64) - 1).clamp(0, 1)
    inputs = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    initial = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (gates, inputs, initial)]


@pytest.mark.parametrize("with_initial", [True, False])
@pytest.mark.parametrize("gate_width", [1, D])
@pytest.mark.parametrize("T", [1, 2, 3, 7, 63, 64, 65, 200])
def test_scan_equals_loop(T, gate_width, with_initial):
    arguments = make_inputs(T, gate_width)[: 3 if with_initial else 2]
    results = []
    for scan in (parallel_scan, reference_scan):
        out = scan(*arguments)
        cotangent = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad((out * cotangent).sum(), arguments, materialize_grads=True)
        results.append([out, *gradients])
    for name, actual, expected in zip(["output", "gates", "inputs", "initial"], *results):
        assert_close(actual, expected, name)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_scan_is_exact_at_constant_gates(gate):
    inputs = torch.arange(1.0, 10.0).view(1, 9, 1)
    out = parallel_scan(torch.full((1, 9, 1), gate), inputs)
    assert torch.equal(out, inputs.cumsum(1) if gate else inputs)


def test_scan_whole_equals_split():
    gates, inputs, initial = make_inputs(T=37)
    first = parallel_scan(gates[:, :10], inputs[:, :10], initial)
    second = parallel_scan(gates[:, 10:], inputs[:, 10:], first[:, -1])
    assert_close(torch.cat([first, second], dim=1), parallel_scan(gates, inputs, initial))


def test_scan_is_causal():
    gates, inputs, _ = make_inputs(T=21)
    changed = [torch.cat([x[:, :13], x[:, 13:] + 1], dim=1) for x in (gates, inputs)]
    assert torch.equal(parallel_scan(*changed)[:, :13], parallel_scan(gates, inputs)[:, :13])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((B, 4, D), (B, 4)), r"inputs must be .*got \[2, 4\]"),
        (((B, 5, D), (B, 4, D)), r"gates must be .*got \[2, 5, 3\]"),
        (((B, 4, 1), (B, 4, D), (B, 1)), r"initial must be .*got \[2, 1\]"),
    ],
)
@pytest.mark.parametrize("scan", [parallel_scan, reference_scan])
def test_shape_errors_name_the_argument(scan, shapes, message):
    with pytest.raises(ValueError, match=message):
        scan(*(torch.zeros(s) for s in shapes))
