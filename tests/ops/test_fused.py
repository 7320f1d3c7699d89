"""The engine in torch operations with a backward pass by hand, against the loop over chunks."""

import re
from dataclasses import replace

import pytest
import torch

from chunk_cases import HIDDEN, Case, arguments, assert_same, bound, call, expected
from helpers import assert_close
from titans.miras import GatedMLP, Huber, KLRetention, MirasConfig, Muon
from titans.ops.memory import fused, workspace
from titans.ops.memory.chunk_rule import ChunkRule, unsupported
from titans.ops.memory.fused import run_chunks
from titans.ops.memory.fused_segment import kept_layout


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("keep", [False, True])
def test_any_cut_into_segments(chunks, keep, monkeypatch):
    case = Case(chunks=7)
    x = arguments(case)
    plan = fused._plan
    monkeypatch.setattr(fused, "_plan", lambda *given: replace(plan(*given), chunks=chunks, keep=keep))
    assert_same(case, x, call(run_chunks, case, x))


def test_no_more_states_are_kept_than_a_backward_needs():
    case = Case(chunks=7)
    x = arguments(case)
    for keep, states in ((True, 8), (False, 2)):
        shapes = kept_layout(bound(case, x), 7, keep, x["q"], HIDDEN, True).shapes
        assert {shape[0] for name, shape in shapes.items() if name.startswith(("weight", "momentum"))} == {states}


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


def test_only_the_end_state_is_used():
    case = Case()
    x = arguments(case)
    found, wanted = (torch.autograd.grad(r[1][0].sum() + r[2][1].sum(), x["k"]) for r in
                     (call(run_chunks, case, x), expected(case, x)))  # fmt: skip
    assert_close(found[0], wanted[0])


def test_a_second_derivative_is_refused():
    case = Case()
    x = arguments(case)
    first = torch.autograd.grad(call(run_chunks, case, x)[0].square().sum(), x["q"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


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


def test_memory_comes_back_after_the_backward_pass():
    """Whoever still holds the outputs: a training loop keeps its loss until the next step has begun."""
    case = Case()
    x = arguments(case)
    workspace.release()
    y = call(run_chunks, case, x)[0]
    assert not workspace._idle
    torch.autograd.grad(y.sum(), x["q"])
    assert workspace._idle
