"""What lies around the scan in C++ against the same in torch operations, with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.layers.convolution import _Depthwise
from titans.ops.memory.native import around, available, unavailable

pytestmark = pytest.mark.skipif(not available(), reason=str(unavailable()))
KINDS = (around.UNIT, around.PLAIN, around.LIMIT)
LONGEST = 1.5


def plain_heads(x: Tensor, tail: Tensor | None, weight: Tensor, kinds, head_dim: int, longest: float):
    taps = len(weight)
    start = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if tail is None else tail
    padded = torch.cat((start, x), 1)
    y = sum(padded[:, j : j + x.shape[1]] * weight[j] for j in range(taps))
    parts = y.unflatten(-1, (len(kinds), -1, head_dim)).unbind(2)  # type: ignore[union-attr]
    done = []
    for kind, part in zip(kinds, parts, strict=True):
        if kind == around.UNIT:
            part = F.normalize(part, dim=-1, eps=1e-12)
        elif kind == around.LIMIT:
            part = part * (longest / torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp_min(longest))
        done.append(part)
    return *done, padded[:, x.shape[1] :]


def plain_norm(x: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    y = F.rms_norm(x if gate is None else x.flatten(2), scale.shape, scale, eps)
    return y if gate is None else y * torch.sigmoid(gate)


def random(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def compare(ours, theirs, inputs: list[Tensor], tolerance: float = 1e-12, skip: tuple[int, ...] = ()) -> None:
    """Outputs, and the gradients of all inputs when every output but those in ``skip`` has a say."""
    found, wanted = (tuple(y) if isinstance(y, tuple) else (y,) for y in (ours(), theirs()))
    weights = [torch.randn_like(y) for y in wanted]
    grads = []
    for outputs in (found, wanted):
        total = sum((y * w).sum() for i, (y, w) in enumerate(zip(outputs, weights, strict=True)) if i not in skip)
        grads.append(torch.autograd.grad(total, inputs, allow_unused=True))  # type: ignore[arg-type]
    for y, right in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        right = torch.zeros_like(y) if right is None else right
        torch.testing.assert_close(y, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 32, 33, 97])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tailed", [False, True])
def test_heads(tokens, taps, tailed):
    torch.manual_seed(tokens)
    x, weight = random(3, tokens, 3 * 2 * 5), random(taps, 3 * 2 * 5)
    tail = random(3, taps - 1, 3 * 2 * 5) if tailed else None
    given = x, tail, weight, KINDS, 5, LONGEST
    inputs = [x, weight] if tail is None else [x, tail, weight]
    compare(lambda: around.heads(*given), lambda: plain_heads(*given), inputs)


@pytest.mark.parametrize("skip", [(0,), (1, 3), (2,), (0, 1, 2), (3,)])
def test_heads_of_which_some_are_not_used(skip):
    torch.manual_seed(0)
    x, tail, weight = random(2, 40, 3 * 7), random(2, 3, 3 * 7), random(4, 3 * 7)
    given = x, tail, weight, KINDS, 7, LONGEST
    compare(lambda: around.heads(*given), lambda: plain_heads(*given), [x, tail, weight], skip=skip)


def test_heads_of_nothing_have_no_infinite_gradient():
    x, weight = torch.zeros(1, 3, 6, requires_grad=True), torch.ones(2, 6, requires_grad=True)
    *parts, after = around.heads(x, None, weight, KINDS, 2, LONGEST)
    torch.autograd.grad(sum(part.sum() for part in parts) + after.sum(), [x, weight])  # type: ignore[arg-type]
    assert all(torch.isfinite(part).all() for part in parts)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 12), (1, 33, 8)])
def test_norm(shape):
    torch.manual_seed(0)
    x, scale = random(*shape), random(shape[-1])
    compare(lambda: around.norm(x, scale, 1e-6), lambda: plain_norm(x, scale, 1e-6), [x, scale])


@pytest.mark.parametrize("heads", [1, 3])
def test_gated_norm(heads):
    torch.manual_seed(0)
    x, scale, gate = random(2, 37, heads, 5), random(5 * heads), random(2, 37, 5 * heads)
    given = x, scale, 1e-6, gate
    compare(lambda: around.gated_norm(*given), lambda: plain_norm(*given), [x, scale, gate])


def test_swiglu():
    torch.manual_seed(0)
    x = random(2, 37, 22)
    compare(lambda: around.swiglu(x), lambda: F.silu(x[..., :11]) * x[..., 11:], [x])


def test_float32():
    torch.manual_seed(0)
    x, weight, scale = (random(*s, dtype=torch.float32) for s in ((2, 70, 96), (4, 96), (96,)))
    given = x, None, weight, KINDS, 16, LONGEST
    compare(lambda: around.heads(*given), lambda: plain_heads(*given), [x, weight], 1e-4)
    compare(lambda: around.norm(x, scale, 1e-6), lambda: plain_norm(x, scale, 1e-6), [x, scale], 1e-4)
    headed = x.detach().unflatten(-1, (6, 16)), scale, 1e-6, x
    compare(lambda: around.gated_norm(*headed), lambda: plain_norm(*headed), [x, scale], 1e-4)
    compare(lambda: around.swiglu(x), lambda: F.silu(x[..., :48]) * x[..., 48:], [x], 1e-5)


def test_strided_inputs():
    torch.manual_seed(0)
    x, scale = random(40, 2, 30), random(30)
    turned, weight = x.transpose(0, 1), random(30, 4)
    given = turned, None, weight.T, KINDS, 5, LONGEST
    compare(lambda: around.heads(*given), lambda: plain_heads(*given), [x, weight])
    compare(lambda: around.norm(turned, scale, 1e-6), lambda: plain_norm(turned, scale, 1e-6), [x, scale])
    compare(lambda: around.swiglu(turned), lambda: F.silu(turned[..., :15]) * turned[..., 15:], [x])


def test_two_threads_give_what_one_gives():
    def everything() -> list[Tensor]:
        torch.manual_seed(0)
        x, weight, scale, gate = (random(*s, dtype=torch.float32) for s in ((2, 999, 48), (4, 48), (48,), (2, 999, 48)))
        *parts, after = around.heads(x, None, weight, KINDS, 4, LONGEST)
        y, z = around.gated_norm(x.unflatten(-1, (6, 8)), scale, 1e-6, gate), around.swiglu(x)
        total = sum((part**2).sum() for part in (*parts, after, y, z))
        return [*parts, after, y, z, *torch.autograd.grad(total, [x, weight, scale, gate])]  # type: ignore[arg-type]

    one = everything()
    torch.set_num_threads(2)
    try:
        two = everything()
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, two))


def test_what_is_not_taken():
    x = torch.zeros(2, 3)
    assert around.usable(x, None, torch.nn.Parameter(x))
    assert not around.usable(x, x.double())
    assert not around.usable(x.bfloat16())
    assert not around.usable(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not around.usable(x)
    assert not torch.vmap(lambda row: torch.full_like(row, around.usable(row)))(x).any()


def test_the_convolution_without_a_compiler_takes_long_texts_in_parts():
    torch.manual_seed(0)
    x, weight = random(2, 600, 6), random(4, 6)
    padded = torch.cat((x.new_zeros(2, 3, 6), x), 1)
    given = x, None, weight, (around.PLAIN,), 6, LONGEST
    compare(lambda: _Depthwise.apply(padded, weight), lambda: plain_heads(*given)[0].squeeze(2), [x, weight])
