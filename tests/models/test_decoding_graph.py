"""The step as one graph: torch.compile, torch.export and ONNX, each equal to the parallel call."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

from helpers import assert_close
from tiny import VARIANTS, ids, small
from titans.models.decoding import DecodingStep, begin_steps, end_steps

READ, TOKENS = 5, 19  # the steps close chunks and a segment


def begun(variant, rows=2):
    """A step, the state to begin from, the tokens, and the logits of one call."""
    model, x = small(variant, n_layers=1).eval(), ids(rows, TOKENS)
    with torch.no_grad():
        return DecodingStep(model), begin_steps(model, model(x[:, :READ]).state), x, model(x)


@torch.no_grad()
def check(step, state, x, whole):
    model = whole.state.origin.model
    for column in range(READ, TOKENS):
        logits, state = step(x[:, column : column + 1], state)
        assert_close(logits[:, 0], whole.logits[:, column], f"column {column}")
    for a, b in zip(*(pytree.tree_leaves(s) for s in (end_steps(model, state), whole.state.layers)), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def others_slow(quick):
    """All variants; those that are not ``quick`` take their time."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", others_slow(["MAC"]))
def test_one_graph_serves_all_tokens(variant, rows):
    """With one row the strides of a slice are not those of a tensor of its own, though it is contiguous."""
    step, state, x, whole = begun(variant, rows)
    counter = CompileCounter()
    torch._dynamo.reset()
    check(torch.compile(step, backend=counter, fullgraph=True), state, x, whole)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_model_decodes_without_a_graph_per_token():
    """It was compiled for its prompts; from a state on it computes as it is."""
    model, x = small("MAC", n_layers=1).eval(), ids(1, TOKENS)
    whole, state = model(x).logits, model(x[:, :READ]).state
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for column in range(READ, TOKENS):
        out = compiled(x[:, column : column + 1], state=state)
        state = out.state
        assert_close(out.logits[:, 0], whole[:, column], f"column {column}")
    assert counter.frame_count == 0


@pytest.mark.parametrize("variant", others_slow(["MAC"]))
def test_the_step_is_exported(variant):
    step, state, x, whole = begun(variant)
    with torch.no_grad():
        exported = torch.export.export(step, (x[:, READ : READ + 1], state))
    check(exported.module(), state, x, whole)


@pytest.mark.parametrize("variant", ["LMM", "MAC"])
def test_a_call_is_exported(variant):
    model, x = small(variant, n_layers=1).eval(), ids(tokens=11)
    with torch.no_grad():
        found = torch.export.export(model, (x,)).module()(x)
        assert_close(found.logits, model(x).logits)


@pytest.mark.parametrize("variant", others_slow(["LMM"]))
def test_the_step_in_onnx(variant, tmp_path):
    """Against the step itself, both in float32: its distance from float64 is no matter of the graph."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    step, state, x, _ = begun(variant)
    step, state = step.float().eval(), state.to(torch.float32)
    with torch.no_grad():
        torch.onnx.export(step, (x[:, READ : READ + 1], state), tmp_path / "step.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    values = [leaf.numpy() for leaf in pytree.tree_leaves(state) if leaf is not None]
    for column in range(READ, TOKENS):
        given = [x[:, column : column + 1].numpy(), *values]
        logits, *values = session.run(None, dict(zip(names, given, strict=True)))
        with torch.no_grad():
            expected, state = step(x[:, column : column + 1], state)
        assert_close(torch.from_numpy(logits), expected, f"column {column}")


def test_a_model_without_a_step_is_refused():
    with pytest.raises(ValueError, match=r"no step of fixed shapes: blocks\.0: full attention"):
        DecodingStep(small("transformer"))
