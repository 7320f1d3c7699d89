"""Both fast engines, in torch operations and compiled, against the loop over chunks."""

import pytest
import torch

from chunk_cases import CASES, Case, arguments, assert_same, call, expected, gradients
from helpers import assert_close
from titans.ops.memory import fused, native, workspace

BUDGETS = {"kept": 1 << 30, "computed again": 0}


@pytest.fixture(params=["fused", "native"])
def run_chunks(request):
    if request.param == "native" and not native.available():
        pytest.skip(str(native.unavailable()))
    return {"fused": fused, "native": native}[request.param].run_chunks


@pytest.mark.parametrize("budget", list(BUDGETS))
@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_loop_over_chunks(run_chunks, name, budget):
    case = CASES[name]
    x = arguments(case)
    assert_same(case, x, call(run_chunks, case, x, memory_budget=BUDGETS[budget]))


def test_without_gradients_nothing_is_kept_and_the_results_are_the_same(run_chunks):
    case = Case(chunks=7)
    x = arguments(case)
    wanted = call(run_chunks, case, x)
    with torch.no_grad():
        found = call(run_chunks, case, x)
    assert found[0].grad_fn is None
    for actual, reference in zip((found[0], *found[1], *found[2]), (wanted[0], *wanted[1], *wanted[2])):
        assert_close(actual, reference)


@pytest.mark.parametrize("only", ["v", "alpha", "gain", "weights1", "anchors0", "momentum0"])
def test_only_one_input_wants_a_gradient(run_chunks, only):
    case = Case()
    every = arguments(case)
    one = {name: t.detach().requires_grad_(name == only) for name, t in every.items()}
    found = gradients(call(run_chunks, case, one), one)
    assert_close(found[only], gradients(expected(case, every), every)[only], only)


def test_the_graph_can_be_walked_twice_and_calls_do_not_disturb_each_other(run_chunks):
    case = Case()
    x, other = arguments(case), arguments(case, seed=5)
    y, second = call(run_chunks, case, x)[0], call(run_chunks, case, other)[0]
    first = torch.autograd.grad(y.sum(), x["q"], retain_graph=True)[0].clone()
    torch.autograd.grad(second.sum(), other["q"])
    call(run_chunks, case, other)
    assert torch.equal(torch.autograd.grad(y.sum(), x["q"])[0], first)


@pytest.mark.parametrize("retention", ["sphere", "anchored"])
def test_rows_of_zeros(run_chunks, retention):
    """A row of A_0 that is zero pins its weights to zero; a forgotten row is left alone. No gradient may be NaN."""
    case = Case(retention=retention)
    x = {name: t.detach() for name, t in arguments(case).items()}
    x["anchors0"][:, 1] = 0
    x["weights0"][:, 1:3] = 0
    x["momentum0"][:, 1:3] = 0
    x["alpha"][:, 4] = 1.0
    x["theta"][:, :5] = 0
    x = {name: t.requires_grad_() for name, t in x.items()}
    assert_same(case, x, call(run_chunks, case, x))


def test_nothing_is_read_before_it_is_written(run_chunks):
    """Borrowed memory full of NaN changes nothing."""
    case = Case()
    x = arguments(case)
    wanted = gradients(call(run_chunks, case, x), x)
    assert workspace._idle
    for block in workspace._idle:
        block[:] = b"\xff" * len(block)
    found = gradients(call(run_chunks, case, x), x)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
