"""Decoding: the step of fixed shapes equals one parallel call, and its states are states like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from helpers import assert_close
from tiny import ALL, SETTINGS, VARIANTS, VOCAB, ids, small, tensors
from titans import MirasConfig, TitansConfig, build_model
from titans.layers.module import Linear
from titans.models import ModelState
from titans.models.decoding import DecodingStep, begin_steps
from titans.ops.memory.native import vectors

STEPPED = [v for v in ALL if v != "transformer"]


def ragged(model, x, counts):
    """The state of rows that have read so many tokens each, and what all tokens of every row alone give."""
    width = max(counts)
    mask = torch.arange(width) < torch.tensor(counts).unsqueeze(1)
    return model(x[:, :width], attention_mask=mask).state, model(x)


def decode(model, x, state, counts, idle=()):
    """Logits of every row's further tokens, one by one; at the steps ``idle`` the first row takes none."""
    read, found, number = list(counts), [[] for _ in counts], 0
    while min(read) < x.shape[1]:
        active = [n < x.shape[1] and not (b == 0 and number in idle) for b, n in enumerate(read)]
        token = torch.stack([x[b, min(n, x.shape[1] - 1)] for b, n in enumerate(read)]).unsqueeze(1)
        out = model(token, state=state, attention_mask=torch.tensor(active).unsqueeze(1))
        state, number = out.state, number + 1
        for b, takes in enumerate(active):
            if takes:
                found[b].append(out.logits[b])
                read[b] += 1
            else:
                assert not out.logits[b].any(), "a row without a token has logits of zero"
    return found, state


def check_rows_decode(model, counts=(6, 3, 9), idle=(2, 3), tokens=21):
    """Rows at different places, some idle now and then, give what one call gives; so does the state behind them."""
    assert model.decoding()[0] == "step"
    x = ids(len(counts), tokens)
    state, whole = ragged(model, x, counts)
    found, state = decode(model, x, state, counts, idle)
    for b, n in enumerate(counts):
        assert_close(torch.cat(found[b]), whole.logits[b, n:], f"row {b}")
    assert state.seen == whole.state.seen
    for a, b in zip(tensors(state), tensors(whole.state), strict=True):
        assert_close(a, b, "state")
    more = ids(len(counts), 7, seed=2)
    assert_close(model(more, state=state).logits, model(more, state=whole.state).logits, "going on")


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_rows_at_different_places_decode_as_in_one_call(variant):
    check_rows_decode(small(variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", SETTINGS)
@torch.no_grad()
def test_other_settings_decode_exactly(variant, changes):
    if variant != "MAC":
        changes = {name: value for name, value in changes.items() if name != "n_memory_tokens"}
    check_rows_decode(small(variant, **changes))


@pytest.mark.parametrize("rule", ["yaad", "moneta", "memora"])
@torch.no_grad()
def test_other_rules_decode_exactly(rule):
    check_rows_decode(small("MAC", miras=getattr(MirasConfig, rule)(), d_hidden=None))
    check_rows_decode(small("LMM", miras=getattr(MirasConfig, rule)(), d_hidden=None))


@torch.no_grad()
def test_blocks_of_attention_beside_a_memory_decode_exactly():
    check_rows_decode(small("MAC", memory_layers=(1,)))


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_rows_begin_anew_and_forget_between_steps(variant):
    model, x = small(variant), ids(3, 14)
    general = copy.deepcopy(model)
    general.set_engine("chunked")
    assert general.decoding()[0] == ("general" if variant != "swa" else "step")
    states = [m(x[:, :5]).state for m in (model, general)]
    for column in range(5, 14):
        outs = [m(x[:, column : column + 1], state=s) for m, s in zip((model, general), states, strict=True)]
        assert_close(outs[0].logits, outs[1].logits, f"column {column}")
        states = [out.state for out in outs]
        if column == 7:
            states = [s.reset([1]) for s in states]
        if column == 10:
            states = [s.forget() for s in states]


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_states_between_steps_are_states_like_any_other(variant, tmp_path):
    model, x = small(variant), ids(2, 12)
    state = model(x[:, :6]).state
    state = model(x[:, 6:7], state=state).state
    before = [t.clone() for t in tensors(state)]
    expected = model(x[:, 7:], state=state).logits
    state.save(tmp_path / "state.safetensors")
    ways = {
        "loaded": ModelState.load(tmp_path / "state.safetensors"), "copied": copy.deepcopy(state),
        "pickled": pickle.loads(pickle.dumps(state)), "forked": state.fork(2).select([0, 2]),
        "put": state.put([0], state.select([0])),
    }  # fmt: skip
    for name, way in ways.items():
        pieces = []
        for column in range(7, 12):
            out = model(x[:, column : column + 1], state=way)
            pieces.append(out.logits)
            way = out.state
        assert_close(torch.cat(pieces, 1), expected, name)
    for a, b in zip(tensors(state), before, strict=True):
        assert torch.equal(a, b), "a step changed the state that it went on from"


@torch.no_grad()
def test_buffers_are_not_used_after_the_weights_have_changed():
    model, x = small("MAG"), ids(2, 9)
    state = model(x[:, :6]).state
    state = model(x[:, 6:7], state=state).state
    model.blocks[0].mixer.branch.persistent.P.mul_(-3)
    general = copy.deepcopy(state.layers)
    found = model(x[:, 7:8], state=state).logits
    model.set_engine("chunked")
    state = ModelState(general, state.read, state.origin)
    assert_close(found, model(x[:, 7:8], state=state).logits)


def test_who_has_no_step_says_why():
    assert small("transformer").decoding() == ("general", "blocks.0: full attention keeps the keys of all tokens")
    kind, reason = small("LMM", miras=MirasConfig(gates="channel"), d_hidden=None).decoding()
    assert kind == "general" and reason == "blocks.0: gates are per channel, not per head"


@torch.no_grad()
def test_shapes_never_change_and_no_count_is_a_python_number():
    model, x = small("MAC"), ids(2, 30)
    state, sizes = model(x[:, :5]).state, set()
    for column in range(5, 30):
        state = model(x[:, column : column + 1], state=state).state
        sizes.add(tuple(t.shape for t in tensors(state.buffers_of(model).steps)))
    assert len(sizes) == 1


@torch.no_grad()
def test_layers_are_not_made_until_asked_for():
    model, x = small("MAC"), ids(2, 9)
    state = model(x[:, :5]).state
    for column in range(5, 8):
        before = model(x[:, column : column + 1], state=state).state
        state = model(x[:, column + 1 : column + 2], state=before).state
        assert "layers" not in vars(before) and "layers" not in vars(state)
    assert len(state.layers) == 2


@torch.no_grad()
def test_a_memory_that_diverges_ends_at_its_chunk():
    config = TitansConfig(variant="LMM", vocab_size=VOCAB, d_model=8, n_layers=1, chunk_size=4, n_persistent=0)
    model, x = build_model(config), ids(1, 8)
    state = model(x[:, :5]).state
    for column in (5, 6):
        state = model(x[:, column : column + 1], state=state).state
    state.buffers_of(model).steps.layers[0].memory.weights[0].fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"memory of blocks\.0 diverged within 8 tokens"):
        model(x[:, 7:], state=state)


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_states_that_share_buffers_go_on_independently(variant):
    """In any order, from any of them, across chunks, segments and windows; ordinary calls are the oracle."""
    model, general = small(variant), copy.deepcopy(small(variant))
    x = ids(1, 40)
    states = [model(x[:, :6]).state]
    oracle = [general(x[:, :6]).state]
    random = torch.Generator().manual_seed(4)
    for step in range(30):
        parent = len(states) - 1 if step % 3 else int(torch.randint(len(states), (), generator=random))
        token = torch.randint(VOCAB, (1, 1), generator=random)
        out = model(token, state=states[parent])
        with torch.enable_grad():  # no steps there
            expected = general(token, state=oracle[parent])
        assert_close(out.logits, expected.logits, f"step {step}")
        states.append(out.state)
        oracle.append(expected.state.detach())
    assert_close(model(x[:, :9], state=states[4]).logits, general(x[:, :9], state=oracle[4]).logits, "an old one")


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_a_state_that_is_given_away_cannot_be_used_and_harms_no_other(variant):
    model, x = small(variant), ids(1, 30)
    whole = model(x).logits
    kept = model(x[:, 5:6], state=model(x[:, :5]).state).state
    before = [t.clone() for t in tensors(ModelState(copy.deepcopy(kept.layers), kept.read, kept.origin))]
    state = model(x[:, 6:7], state=kept).state
    for column in range(7, 30):
        given = state.given()
        with pytest.raises(ValueError, match="given away"):
            model(x[:, :1], state=state)
        with pytest.raises(ValueError, match="given away"):
            _ = state.layers
        out = model(x[:, column : column + 1], state=given)
        assert_close(out.logits[:, 0], whole[:, column], f"column {column}")
        state = out.state
    for a, b in zip(tensors(kept), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_decodes_exactly_without_compiled_vectors(variant, monkeypatch):
    monkeypatch.setattr(vectors, "usable", lambda x: False)
    check_rows_decode(small(variant))


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_many_rows_decode_exactly(variant):
    rows = vectors.ROWS + 1
    check_rows_decode(small(variant), counts=range(3, 3 + rows), tokens=15)


@pytest.mark.skipif(vectors.unavailable() is not None, reason="no compiler")
@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_no_layer_is_called_where_the_vectors_are_compiled(variant, monkeypatch):
    """Else it is slow, and nobody notices."""
    model, x, called = small(variant, chunk_size=16, segment_len=16), ids(1, 9), []
    state = model(x[:, 5:6], state=model(x[:, :5]).state).state
    for kind in (Linear, torch.nn.RMSNorm):
        monkeypatch.setattr(kind, "forward", lambda self, x: called.append(self))
    model(x[:, 6:7], state=state)
    assert not called


@pytest.mark.skipif(vectors.unavailable() is not None, reason="no compiler")
@torch.no_grad()
def test_a_memory_step_is_compiled_where_its_rule_is(monkeypatch):
    model, x, called = small("LMM", chunk_size=16), ids(1, 9), []
    state = model(x[:, 5:6], state=model(x[:, :5]).state).state
    monkeypatch.setattr("titans.ops.memory.decode.step", lambda *a, **k: called.append(a))
    model(x[:, 6:7], state=state)
    assert not called


@torch.no_grad()
def test_hooks_and_other_layers_are_called_in_decoding_too():
    model, x = small("MAC"), ids(1, 9)
    state, seen = model(x[:, :5]).state, []
    block = model.blocks[0]
    for layer in (
        block.mixer.attention.q,
        block.mixer.memory.out,
        block.mixer_norm,
        block.ffn,
        block.ffn.up,
        model.head,
    ):
        layer.register_forward_hook(lambda module, *_: seen.append(module))
    before = model(x[:, 5:6], state=state).logits
    assert len(seen) == 6
    block.mixer.context_query = torch.nn.Sequential(block.mixer.context_query, torch.nn.Identity())
    torch.testing.assert_close(model(x[:, 5:6], state=state).logits, before)


def test_a_step_has_gradients_where_they_are_asked_for():
    model, x = small("MAC"), ids(1, 9)
    with torch.no_grad():
        buffers = begin_steps(model, model(x[:, :5]).state)
    logits, _ = DecodingStep(model)(x[:, 5:6], buffers)
    logits.square().sum().backward()
    for name, parameter in model.blocks[0].mixer.named_parameters():
        if "context" in name or "attention" in name or "qkv" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def general(model, token, state):
    """One token by any other call."""
    with torch.enable_grad():
        return model(token, state=state).logits.detach()


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_a_state_of_another_dtype_decodes_as_any_call_reads_it(variant):
    """`state.to(dtype)`, a call under autocast in between, or weights converted since: never numbers of one dtype taken
    for another's."""
    x = ids(2, 23)
    token = x[:, :1]
    for weights, held in (
        (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float64),
        (torch.float64, torch.float32), (torch.float64, torch.bfloat16), (torch.bfloat16, torch.float64),
    ):  # fmt: skip
        model = small(variant, **({"n_memory_tokens": 2} if variant == "MAC" else {})).to(weights)
        state = model(x).state.to(held)
        out = model(token, state=state)
        assert_close(out.logits, general(model, token, state), f"{weights} reads {held}")
        other = torch.float64 if weights is torch.float32 else torch.float32
        assert_close(model(token, state=out.state.to(held)).logits, general(model, token, out.state.to(held)), "later")
        model.to(other)
        assert_close(model(token, state=out.state).logits, general(model, token, out.state), f"made {other} since")


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_a_token_read_under_autocast_leaves_a_state_for_calls_without(variant):
    model, x = small(variant).float(), ids(2, 23)
    state = model(x).state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = model(x[:, :1], state=state).state
    token = x[:, 1:2]
    assert_close(model(token, state=after).logits, general(model, token, after))


@torch.no_grad()
def test_a_layer_converted_alone_is_no_matter_for_native_code():
    """Or it is refused by torch; native code is never told that its numbers are another dtype's."""
    for name in ("memory.conv", "attention.conv", "context_conv"):
        model, x = small("MAC").float(), ids(2, 23)
        state = model(x).state
        model.blocks[1].mixer.get_submodule(name).double()
        token = x[:, :1]
        assert_close(model(token, state=state).logits, general(model, token, state), name, 1e-4)


def test_native_code_is_not_given_numbers_of_two_dtypes():
    with pytest.raises(RuntimeError, match="torch.bfloat16 and torch.float32"):
        vectors.pack((1,), (torch.zeros(2), None, torch.zeros(2, dtype=torch.bfloat16)))
    with pytest.raises(RuntimeError, match="alone, got tensors of torch.float16"):
        vectors.pack((1,), (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.int64)))
