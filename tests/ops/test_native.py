"""The compiled engine against the loop over chunks, in the cases of the other fast engine."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from chunk_cases import CASES, Case, arguments, assert_same, bound, call, gradients
from titans.ops.memory.native import available, native, run_chunks, unavailable

needs_compiler = pytest.mark.skipif(not available(), reason=str(unavailable()))


@needs_compiler
@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("keep", [False, True])
def test_states_between_those_that_are_kept(every, keep, monkeypatch):
    case = Case(chunks=7, size=3)
    x = arguments(case)
    monkeypatch.setattr(native, "_plan", lambda *_: (every, keep))
    assert_same(case, x, call(run_chunks, case, x))


def test_a_state_is_kept_every_64_tokens_or_every_chunk_of_more():
    for size, every in ((1, 16), (16, 4), (64, 1), (128, 1)):
        shape = native._Shape(1, 20, size, 8, 8, 0, 0, 0, 0, 1, 0)
        assert native._plan(shape, True, 1 << 40) == (every, True)
    assert native._plan(shape, False, 1 << 40) == (20, False), "no gradients, nothing to keep"


@needs_compiler
@pytest.mark.parametrize("name", ["anchored", "silu", "weight decay", "matrix"])
def test_float32(name):
    case = replace(CASES[name], size=16)
    x = arguments(case, torch.float32)
    x["theta"] = (x["theta"].detach() / 4).requires_grad_()  # or the rule itself multiplies the rounding errors
    assert_same(case, x, call(run_chunks, case, x), tolerance=1e-4)


@needs_compiler
def test_gradcheck():
    case = Case(size=2, chunks=2)
    x = {name: t.detach()[:1].requires_grad_() for name, t in arguments(case).items()}

    def outputs(*flat):
        y, weights, momentum = call(run_chunks, case, dict(zip(x, flat, strict=True)), memory_budget=0)
        return y, *weights, *momentum

    torch.autograd.gradcheck(outputs, tuple(x.values()))


@needs_compiler
def test_two_threads_give_what_one_gives():
    case = Case(size=16)
    x = arguments(case)
    one = gradients(call(run_chunks, case, x), x)
    torch.set_num_threads(2)
    try:
        two = gradients(call(run_chunks, case, x), x)
    finally:
        torch.set_num_threads(1)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@needs_compiler
def test_operators_are_well_formed():
    case = Case(masked=True)
    x = arguments(case)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.titans, "memory_scan", lambda *a: seen.append(a) or native._scan(*a))
        call(run_chunks, case, x)
    torch.library.opcheck(
        native._scan, seen[0], test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@needs_compiler
def test_inside_a_compiled_graph():
    case = Case()
    x = arguments(case)

    rule = bound(case, x)

    def double(x):
        y, weights, momentum = call(run_chunks, case, x, rule)
        return 2 * y, weights, momentum

    graph = torch.compile(double, backend="aot_eager", fullgraph=True)
    y, weights, momentum = graph(x)
    assert_same(case, x, (y / 2, weights, momentum))


def test_without_a_compiler_nothing_breaks():
    script = """
        import os
        os.environ |= {"PATH": "", "CXX": "", "TITANS_CACHE": "/nonexistent"}
        from titans.ops.memory import native
        assert not native.available()
        assert "no C++ compiler" in native.unavailable()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_a_compiler_that_fails_is_reported(tmp_path):
    told = "echo 'included here:' >&2\necho 'fatal error: no such header' >&2"
    (tmp_path / "g++").write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\n{told}\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    script = f"""
        import os
        os.environ |= {{"CXX": "{tmp_path}/g++", "TITANS_CACHE": "{tmp_path}/cache"}}
        from titans.ops.memory import native
        assert "failed: fatal error: no such header" in native.unavailable(), native.unavailable()
        try:
            native.build.library()
        except RuntimeError as error:
            assert "no such header" in str(error)
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
