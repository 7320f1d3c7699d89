"""Attention against its per-query reference, causality, streaming, padding, and rotary positions."""

import math

import pytest
import torch

from helpers import assert_close
from titans.ops.attention import (
    apply_rotary,
    causal_attention,
    reference_causal_attention,
    reference_segment_attention,
    reference_sliding_window_attention,
    rotary_angles,
    segment_attention,
    sliding_window_attention,
)

B, H, D = 2, 2, 5
CAUSAL = (causal_attention, reference_causal_attention)
WINDOW = (sliding_window_attention, reference_sliding_window_attention)
SEGMENT = (segment_attention, reference_segment_attention)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def make_inputs(T, offset=0, P=0, persistent_rows=1, memory=False, dtype=torch.float64):
    """Positional tensors (q, k, v[, memory_k, memory_v]) and the persistent triple or None."""
    S = offset + T
    tensors = [random(B, n, H, D, seed=i, dtype=dtype) for i, n in enumerate([T, S, S, S, S][: 5 if memory else 3])]
    if P == 0:
        return tensors, None
    shapes = [(B, T), (persistent_rows, P), (persistent_rows, P)]
    return tensors, tuple(random(*s, H, D, seed=10 + i, dtype=dtype) for i, s in enumerate(shapes))


def first_valid_columns(offset):
    return torch.tensor([0, offset]) if offset else None


def check_against_reference(forms, tensors, persistent, *extra, start=None):
    """Outputs and the gradients of all inputs, under a random output gradient."""
    inputs = [*tensors, *(persistent or ())]
    results = []
    for form in forms:
        out = form(*tensors, *extra, start=start, persistent=persistent)
        results.append([out, *torch.autograd.grad((out * random(*out.shape, seed=99)).sum(), inputs)])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(actual, expected, "output" if i == 0 else f"gradient of input {i - 1}")


@pytest.mark.parametrize(
    ("T", "offset", "P", "persistent_rows"),
    [(1, 0, 0, 1), (1, 9, 3, 1), (7, 0, 3, B), (7, 5, 0, 1), (63, 0, 4, 1), (65, 0, 0, 1), (33, 31, 2, B)],
)
@pytest.mark.parametrize("forms", [CAUSAL, SEGMENT], ids=["causal", "segment"])
def test_causal_and_segment_equal_reference(forms, T, offset, P, persistent_rows):
    tensors, persistent = make_inputs(T, offset, P, persistent_rows, memory=forms is SEGMENT)
    check_against_reference(forms, tensors, persistent)
    if offset:
        check_against_reference(forms, tensors, persistent, start=first_valid_columns(offset))


@pytest.mark.parametrize(
    ("T", "window", "offset", "P", "persistent_rows"),
    [
        (1, 1, 0, 0, 1),
        (1, 5, 0, 2, 1),
        (1, 5, 12, 2, 1),
        (7, 1, 3, 3, 1),
        (7, 5, 4, 0, 1),
        (7, 64, 40, 3, B),
        (63, 5, 0, 0, 1),
        (63, 5, 2, 3, B),
        (63, 16, 15, 3, 1),
        (63, 64, 0, 2, 1),
        (65, 1, 0, 2, 1),
        (65, 5, 30, 0, 1),
        (65, 16, 0, 2, B),
        (65, 16, 40, 2, 1),
        (65, 64, 63, 0, 1),
    ],
)
def test_sliding_window_equals_reference(T, window, offset, P, persistent_rows):
    tensors, persistent = make_inputs(T, offset, P, persistent_rows)
    check_against_reference(WINDOW, tensors, persistent, window)
    if offset:
        check_against_reference(WINDOW, tensors, persistent, window, start=first_valid_columns(offset))


def test_start_hides_columns_before_it():
    (q, k, v), _ = make_inputs(T=12, offset=8)
    start = torch.tensor([3, 8])
    for form, extra in ((causal_attention, ()), (sliding_window_attention, (5,))):
        out = form(q, k, v, *extra, start=start)
        for b, first in enumerate(start.tolist()):
            alone = form(q[b : b + 1], k[b : b + 1, first:], v[b : b + 1, first:], *extra)
            assert_close(out[b : b + 1], alone)


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("name", ["causal", "window", "segment"])
def test_outputs_depend_on_exactly_the_visible_columns(name, P):
    T, offset, window, query = 20, 4, 6, 11
    tensors, persistent = make_inputs(T, offset, P, memory=name == "segment")
    form = {"causal": causal_attention, "window": sliding_window_attention, "segment": segment_attention}[name]
    out = form(*tensors, *((window,) if name == "window" else ()), persistent=persistent)
    first = offset + query - window + 1 if name == "window" else 0
    expected = torch.zeros(offset + T, dtype=torch.bool)
    expected[first : offset + query + 1] = True
    for gradient in torch.autograd.grad(out[:, query].square().sum(), tensors[1:]):
        assert torch.equal(gradient.abs().sum((0, 2, 3)) > 0, expected)


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("pieces", [[1] * 23, [7, 16], [2, 20, 1]])
def test_window_whole_equals_split_with_cache(pieces, P):
    window = 5
    (q, k, v), persistent = make_inputs(sum(pieces), P=P)
    whole = sliding_window_attention(q, k, v, window, persistent=persistent)
    outputs, begin = [], 0
    for length in pieces:
        here = slice(begin, begin + length)
        cached = slice(max(0, begin - window + 1), begin + length)
        part = persistent and (persistent[0][:, here], *persistent[1:])
        outputs.append(sliding_window_attention(q[:, here], k[:, cached], v[:, cached], window, persistent=part))
        begin += length
    assert_close(torch.cat(outputs, dim=1), whole)


def test_right_padding_is_finite_and_does_not_reach_real_queries():
    real = 9
    tensors, persistent = make_inputs(T=17, P=2, memory=True)
    padded = [x.detach().clone() for x in tensors]
    for x in padded:
        x[:, real:] = 0.0
        x.requires_grad_()
    cases = [(causal_attention, 3, ()), (sliding_window_attention, 3, (4,)), (segment_attention, 5, ())]
    for form, count, extra in cases:
        out = form(*padded[:count], *extra, persistent=persistent)
        assert_close(out[:, :real], form(*tensors[:count], *extra, persistent=persistent)[:, :real])
        gradients = torch.autograd.grad(out.sum(), padded[:count])
        assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_to_the_reference(dtype):
    tensors, persistent = make_inputs(T=33, offset=4, P=3, dtype=dtype)
    start = first_valid_columns(4)
    out = sliding_window_attention(*tensors, 8, start=start, persistent=persistent)
    expected = reference_sliding_window_attention(
        *(x.double() for x in tensors), 8, start=start, persistent=tuple(x.double() for x in persistent)
    )
    assert out.dtype == dtype
    assert_close(out, expected.to(dtype))


def test_compiles_without_graph_breaks():
    tensors, persistent = make_inputs(T=13, offset=3, P=2)
    compiled = torch.compile(sliding_window_attention, backend="aot_eager", fullgraph=True)
    for first in (0, 2):
        arguments = {"start": torch.tensor([first, 3]), "persistent": persistent}
        assert_close(compiled(*tensors, 4, **arguments), sliding_window_attention(*tensors, 4, **arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: causal_attention(q[0], k, k), r"q must be .*got \[4, 2, 5\]"),
        (lambda q, k: causal_attention(q, k[:, :3], k), r"k must be .*got \[2, 3, 2, 5\]"),
        (lambda q, k: causal_attention(q, k, k[..., :4]), r"v must have .*got \[2, 6, 2, 4\]"),
        (lambda q, k: causal_attention(q, k, k, start=torch.zeros(3)), r"start must be .*got \[3\]"),
        (lambda q, k: causal_attention(q, k, k, persistent=(k, k, k)), r"persistent q_p must .*got \[2, 6, 2, 5\]"),
        (lambda q, k: causal_attention(q, k, k, persistent=(q, k[0], k)), r"persistent k_p must .*got \[6, 2, 5\]"),
        (lambda q, k: causal_attention(q, k, k, persistent=(q, k, q)), r"persistent v_p must .*got \[2, 4, 2, 5\]"),
        (lambda q, k: sliding_window_attention(q, k, k, 0), "window must be at least 1, got 0"),
        (lambda q, k: segment_attention(q, k, k, q, k), r"memory_k must have .*got \[2, 4, 2, 5\]"),
        (lambda q, k: rotary_angles(q, D), r"positions must be .*got \[2, 4, 2, 5\]"),
        (lambda q, k: apply_rotary(q, *rotary_angles(torch.arange(3), D)), r"cos must be .*got \[3, 2\]"),
    ],
)
def test_shape_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(random(B, 4, H, D), random(B, 6, H, D))


@pytest.mark.parametrize("position", [3, 2_000_000])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_rotary_rotates_each_pair_by_its_angle(position, width):
    x = random(1, 1, H, width).detach()
    out = apply_rotary(x, *rotary_angles(torch.tensor([position]), width, dtype=torch.float64))
    pairs = width // 2
    expected = x.clone()
    for i in range(pairs):
        angle = position * 10000.0 ** (-i / pairs)
        first, second = x[..., i], x[..., i + pairs]
        expected[..., i] = first * math.cos(angle) - second * math.sin(angle)
        expected[..., i + pairs] = first * math.sin(angle) + second * math.cos(angle)
    assert_close(out, expected)


def test_rotary_scores_depend_on_the_distance_alone_even_far_out_in_float32():
    q, k = random(1, 1, H, 64, dtype=torch.float32), random(1, 1, H, 64, seed=1, dtype=torch.float32)

    def score(position):
        q_angles, k_angles = (rotary_angles(torch.tensor([p]), 64) for p in (position, position - 5))
        return (apply_rotary(q, *q_angles) * apply_rotary(k, *k_angles)).sum(-1)

    assert_close(score(2_000_000), score(5))


def test_rotary_takes_positions_per_row_and_keeps_the_dtype():
    x = random(B, 6, H, 8, dtype=torch.bfloat16)
    positions = torch.stack([torch.arange(6), torch.arange(6) + 100])
    out = apply_rotary(x, *rotary_angles(positions, 8))
    assert out.dtype == torch.bfloat16
    for b in range(B):
        assert torch.equal(out[b : b + 1], apply_rotary(x[b : b + 1], *rotary_angles(positions[b], 8)))
