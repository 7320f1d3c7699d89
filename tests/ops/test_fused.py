"""The engine in torch operations with a backward pass by hand, against the loop over chunks."""

import re
from dataclasses import replace

import pytest
import torch

from chunk_cases import CASES, Case, arguments, assert_same, call, expected, gradients
from helpers import assert_close
from titans.miras import GatedMLP, Huber, KLRetention, MirasConfig, Muon
from titans.ops.memory import fused, workspace
from titans.ops.memory.chunk_rule import ChunkRule, unsupported
from titans.ops.memory.fused import run_chunks

BUDGETS = {"kept": 1 << 30, "computed again": 0}


@pytest.mark.parametrize("budget", list(BUDGETS))
@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_loop_over_chunks(name, budget):
    case = CASES[name]
    x = arguments(case)
    assert_same(case, x, call(run_chunks, case, x, memory_budget=BUDGETS[budget]))


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("keep", [False, True])
def test_any_cut_into_segments(chunks, keep, monkeypatch):
    case = Case(chunks=7)
    x = arguments(case)
    plan = fused._plan
    monkeypatch.setattr(fused, "_plan", lambda *given: replace(plan(*given), chunks=chunks, keep=keep))
    assert_same(case, x, call(run_chunks, case, x))


def test_float32():
    case = Case(size=16)
    x = arguments(case, torch.float32)
    x["theta"] = (x["theta"].detach() / 4).requires_grad_()  # or the rule itself multiplies the rounding errors
    assert_same(case, x, call(run_chunks, case, x), tolerance=1e-4)


@pytest.mark.parametrize(
    "case", [Case(size=2, chunks=2), Case(size=2, chunks=2, network="matrix", norm=False)], ids=str
)
def test_gradcheck(case):
    x = {name: t.detach()[:1].requires_grad_() for name, t in arguments(case).items()}

    def outputs(*flat):
        y, weights, momentum = call(run_chunks, case, dict(zip(x, flat, strict=True)), memory_budget=0)
        return y, *weights, *momentum

    torch.autograd.gradcheck(outputs, tuple(x.values()))


def test_without_gradients_nothing_is_kept_and_the_results_are_the_same():
    case = Case(chunks=7)
    x = arguments(case)
    wanted = call(run_chunks, case, x)
    with torch.no_grad():
        found = call(run_chunks, case, x)
    assert found[0].grad_fn is None
    for actual, reference in zip((found[0], *found[1], *found[2]), (wanted[0], *wanted[1], *wanted[2])):
        assert_close(actual, reference)


@pytest.mark.parametrize("only", ["v", "alpha", "gain", "weights1", "anchors0", "momentum0"])
def test_only_one_input_wants_a_gradient(only):
    case = Case()
    every = arguments(case)
    one = {name: t.detach().requires_grad_(name == only) for name, t in every.items()}
    found = gradients(call(run_chunks, case, one), one)
    assert_close(found[only], gradients(expected(case, every), every)[only], only)


def test_only_the_end_state_is_used():
    case = Case()
    x = arguments(case)
    found, wanted = (torch.autograd.grad(r[1][0].sum() + r[2][1].sum(), x["k"]) for r in
                     (call(run_chunks, case, x), expected(case, x)))  # fmt: skip
    assert_close(found[0], wanted[0])


def test_the_graph_can_be_walked_twice_and_calls_do_not_disturb_each_other():
    case = Case()
    x, other = arguments(case), arguments(case, seed=5)
    y, second = call(run_chunks, case, x)[0], call(run_chunks, case, other)[0]
    first = torch.autograd.grad(y.sum(), x["q"], retain_graph=True)[0].clone()
    torch.autograd.grad(second.sum(), other["q"])
    call(run_chunks, case, other)
    assert torch.equal(torch.autograd.grad(y.sum(), x["q"])[0], first)


def test_a_second_derivative_is_refused():
    case = Case()
    x = arguments(case)
    first = torch.autograd.grad(call(run_chunks, case, x)[0].square().sum(), x["q"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("retention", ["sphere", "anchored"])
def test_rows_of_zeros(retention):
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


def test_two_calls_are_one():
    case = Case(chunks=4)
    x = arguments(case)
    whole = call(run_chunks, case, x)
    cut = 2 * case.size
    tokens = {n: t for n, t in x.items() if t.shape[1] == case.chunks * case.size}
    first = call(run_chunks, case, x | {n: t[:, :cut] for n, t in tokens.items()})
    carried = {
        f"{name}{i}": t for name, ts in (("weights", first[1]), ("momentum", first[2])) for i, t in enumerate(ts)
    }
    second = call(run_chunks, case, x | {n: t[:, cut:] for n, t in tokens.items()} | carried)
    assert_same(replace(case), x, (torch.cat((first[0], second[0]), 1), *second[1:]))
    assert_close(second[1][0], whole[1][0])


def test_what_is_not_supported_is_named():
    assert unsupported(MirasConfig.steady()) is None
    assert unsupported(MirasConfig.titans()) is None
    for change, reason in [
        ({"architecture": GatedMLP()}, "gated_mlp|GatedMLP"),
        ({"bias": Huber()}, "Huber"),
        ({"retention": KLRetention()}, "KL"),
        ({"algorithm": Muon()}, "Muon"),
        ({"gates": "channel"}, "channel"),
    ]:
        assert re.search(reason, str(unsupported(MirasConfig(**change)))), reason


def test_wrong_arguments_are_named():
    case = Case()
    x = arguments(case)
    for name, wrong in [
        ("k", x["k"][:, :-1]),
        ("v", x["v"].float()),
        ("alpha", x["alpha"].unsqueeze(-1)),
        ("anchors0", x["anchors0"].mT),
        ("gain", x["gain"].squeeze(1)),
    ]:
        with pytest.raises(ValueError, match=name.rstrip("01")):
            call(run_chunks, case, x | {name: wrong})
    with pytest.raises(ValueError, match="whole chunks"):
        call(run_chunks, replace(case, size=4), x)
    with pytest.raises(ValueError, match="momentum must be"):
        call(run_chunks, case, {name: t for name, t in x.items() if name not in ("eta", "alpha")})
    with pytest.raises(ValueError, match="Huber"):
        ChunkRule.of(MirasConfig.yaad(), 4, (), None, None)
    with pytest.raises(ValueError, match="retention"):
        ChunkRule("gelu", "lq", 4)
    with pytest.raises(ValueError, match="anchors"):
        ChunkRule("gelu", "sphere", 4)


def test_memory_is_used_again_once_the_last_tensor_over_it_is_gone():
    def borrow():
        return workspace.borrow(1 << 20, torch.float32, torch.device("cpu"))

    workspace.release()
    first, second = borrow(), borrow()
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    view = first[5:]
    del first
    third = borrow()
    assert third.data_ptr() not in places, "a view still stands there"
    del view, second
    again = borrow(), borrow()
    assert {x.data_ptr() for x in again} == places


def test_nothing_is_read_before_it_is_written():
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


def test_memory_comes_back_after_the_backward_pass():
    """Whoever still holds the outputs: a training loop keeps its loss until the next step has begun."""
    case = Case()
    x = arguments(case)
    workspace.release()
    y = call(run_chunks, case, x)[0]
    assert not workspace._idle
    torch.autograd.grad(y.sum(), x["q"])
    assert workspace._idle
