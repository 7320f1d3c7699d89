"""The models' laws: exact streaming, causality, independence, padding, bounded state, errors."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import pytest
import torch

from helpers import assert_close
from tiny import ALL, SETTINGS, VARIANTS, VOCAB, ids, small, tensors
from titans import MirasConfig, NeuralMemory, TitansConfig, TitansMAC, build_model, count_parameters, load_model
from titans.models import ModelState
from titans.models.config import PRESET_LAYERS
from titans.models.mixers import mac
from titans.ops.memory import chunked
from titans.ops.rows import Rows


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("cuts", [tuple(range(1, 21)), (8, 16), (3, 10, 11)])
def test_any_split_equals_the_whole(variant, cuts):
    model, x = small(variant), ids()
    whole = model(x)
    pieces, state = [], None
    for start, stop in itertools.pairwise((0, *cuts, 21)):
        out = model(x[:, start:stop], state=state)
        pieces.append(out.logits)
        state = out.state
    assert_close(torch.cat(pieces, 1), whole.logits, "logits")
    for a, b in zip(tensors(state), tensors(whole.state), strict=True):
        assert_close(a, b, "state")


def test_the_narrowest_feed_forward_is_built():
    assert small("MAC", ffn_mult=0.01).blocks[0].ffn.down.in_features == 8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", SETTINGS)
def test_settings_stream_exactly(variant, changes):
    if variant != "MAC":
        changes = {name: value for name, value in changes.items() if name != "n_memory_tokens"}
    model, x = small(variant, **changes), ids()
    whole = model(x).logits
    first = model(x[:, :7])
    second = model(x[:, 7:], state=first.state)
    assert_close(torch.cat((first.logits, second.logits), 1), whole, "logits")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_a_carried_state_exactly(variant):
    model, x = small(variant), ids(tokens=13)
    model(x, labels=x).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    first = model(x[:, :6])
    second = model(x[:, 6:], state=first.state)
    logits = torch.cat((first.logits, second.logits), 1)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_but_none_is_reached_by_the_loss(variant):
    model, x = small(variant), ids()
    model(x, labels=x).loss.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []


@pytest.mark.parametrize("variant", ALL)
def test_a_token_changes_no_earlier_output_and_no_other_sample(variant):
    model, x = small(variant), ids()
    before = model(x).logits
    for position in (0, 7, 8, 13, 20):
        changed = x.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        after = model(changed).logits
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[0, :position], before[0, :position])
        assert not torch.equal(after[0, position], before[0, position])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_token_reaches_the_last_output_beyond_every_window(variant):
    model, x = small(variant), ids(tokens=60)
    changed = x.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    assert (model(changed).logits[0, -1] - model(x).logits[0, -1]).abs().max() > 1e-9


@pytest.mark.parametrize("variant", ALL)
def test_left_padded_rows_equal_their_unpadded_selves(variant):
    model, x = small(variant), ids(tokens=19)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :6] = 0
    out = model(x, attention_mask=mask)
    assert out.state.seen == (13, 19)
    alone = model(x[:1, 6:])
    assert_close(out.logits[:1, 6:], alone.logits, "padded row")
    assert_close(out.logits[1:], model(x[1:]).logits, "full row")
    assert out.logits[0, :6].abs().max() == 0
    # Both go on, from different phases.
    y = ids(tokens=7, seed=2)
    following = model(y, state=out.state).logits
    assert_close(following[:1], model(y[:1], state=alone.state).logits, "padded row, continued")
    assert_close(following[1:], model(y[1:], state=out.state.select([1])).logits, "selected row")


@pytest.mark.parametrize("variant", ALL)
def test_padding_inside_and_behind_changes_nothing(variant):
    model, x = small(variant), ids(tokens=19)
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(4)) > 0.4
    out = model(x, attention_mask=mask)
    more = model(x, attention_mask=mask.flip(1), state=out.state)
    for row in range(2):
        alone = model(x[row : row + 1, mask[row]])
        assert_close(out.logits[row, mask[row]], alone.logits[0], f"row {row}")
        again = model(x[row : row + 1, mask.flip(1)[row]], state=alone.state)
        assert_close(more.logits[row, mask.flip(1)[row]], again.logits[0], f"row {row}, continued")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stored", [False, True])
def test_rows_that_start_anew_go_along_with_the_others(variant, stored):
    """As training on carried state has it: windows of whole segments, some rows reset."""
    model, first, second = small(variant), ids(3, 16), ids(3, 16, seed=2)
    state = model(first).state.detach()
    flags = {"store_mask": torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5} if stored else {}
    out = model(second, state=state.reset([0, 2]), **flags)

    def alone(row):
        mine = {name: value[row : row + 1] for name, value in flags.items()}
        return model(second[row : row + 1], state=state.select([1]) if row == 1 else None, **mine)

    for row in range(3):
        assert_close(out.logits[row : row + 1], alone(row).logits, f"row {row}")
        further = model(first[row : row + 1], state=out.state.select([row])).logits
        assert_close(further, model(first[row : row + 1], state=alone(row).state).logits, f"row {row}, going on")
    parameters = dict(model.named_parameters())
    together = torch.autograd.grad(out.logits.square().sum(), parameters.values(), allow_unused=True)
    total = torch.stack([alone(row).logits.square().sum() for row in range(3)]).sum()
    apart = torch.autograd.grad(total, parameters.values(), allow_unused=True)
    for name, a, b in zip(parameters, together, apart, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert_close(a, b, f"gradient of {name}", 1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("flag", ["attention_mask", "store_mask"])
def test_a_row_starts_anew_after_padding_or_unstored_tokens(variant, flag):
    """The others then stand inside a chunk that knows which of its tokens write; a new row's does not."""
    model, x, y = small(variant), ids(tokens=8), ids(tokens=5, seed=5)
    flags = torch.ones_like(x, dtype=torch.bool)
    flags[1, -2:] = False
    state = model(x, **{flag: flags}).state
    out = model(y, state=state.reset([1]))
    assert_close(out.logits[1:], model(y[1:]).logits, "reset row")
    assert_close(out.logits[:1], model(y[:1], state=state.select([0])).logits, "other row")


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_row_equals_a_new_stream(variant):
    model, x, y = small(variant), ids(tokens=10), ids(tokens=11, seed=5)
    state = model(x).state
    out = model(y, state=state.reset([1]))
    assert out.state.seen == (21, 11)
    assert_close(out.logits[1:], model(y[1:]).logits, "reset row")
    assert_close(out.logits[:1], model(y[:1], state=state.select([0])).logits, "other row")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fully_masked_fresh_row_starts_later(variant):
    model, x = small(variant), ids(tokens=6)
    mask = torch.tensor([[0] * 6, [1] * 6])
    out = model(x, attention_mask=mask)
    later = model(x, state=out.state)
    assert_close(later.logits[:1], model(x[:1]).logits, "late row")


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_size_does_not_depend_on_the_context(variant):
    model = small(variant)
    sizes = []
    for tokens in (41, 81, 161):
        with torch.no_grad():
            sizes.append(model(ids(tokens=tokens)).state.nbytes)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_store_mask_switches_writes_off_but_not_reads(variant):
    model, x = small(variant), ids(tokens=17)
    store = torch.ones(2, 17)
    store[:, 5:] = 0
    written, unwritten = model(x), model(x, store_mask=store)
    assert_close(unwritten.logits[:, :5], written.logits[:, :5], "before")
    assert (unwritten.logits[:, -1] - written.logits[:, -1]).abs().max() > 1e-6
    first = model(x[:, :5])
    second = model(x[:, 5:], state=first.state, store_mask=store[:, 5:])
    assert_close(second.logits, unwritten.logits[:, 5:], "streamed")


@pytest.mark.parametrize("variant", ALL)
def test_greedy_generation_equals_full_forward_and_padding_changes_nothing(variant):
    model, x = small(variant), ids(tokens=9)
    out = model.generate(x, max_new_tokens=6, temperature=0)
    for step in range(6):
        assert torch.equal(model(out[:, : 9 + step]).logits[:, -1].argmax(-1), out[:, 9 + step])
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    padded = model.generate(x, max_new_tokens=6, temperature=0, attention_mask=mask)
    assert torch.equal(padded[0, 9:], model.generate(x[:1, 4:], max_new_tokens=6, temperature=0)[0, 5:])
    assert torch.equal(padded[1], out[1])
    streamed = torch.stack(list(model.stream(x, max_new_tokens=6, temperature=0)), 1)
    assert torch.equal(streamed, out[:, 9:])


def test_generation_stops_at_the_end_token_and_is_seeded():
    model, x = small("MAC"), ids()
    draws = [model.generate(x, 30, top_k=5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    end = int(draws[0][0, 23])
    out = model.generate(x, 30, top_k=5, eos_token_id=end, generator=torch.Generator().manual_seed(3))
    for row in out[:, 21:].tolist():
        if end in row:
            assert set(row[row.index(end) :]) == {end}
    full, state = model.generate(x, 4, temperature=0, return_state=True)
    assert state.seen == (24, 24)
    assert torch.equal(
        model.generate(full[:, -1:], 1, temperature=0, state=state)[:, -1:], model.generate(x, 5, temperature=0)[:, -1:]
    )


def test_loss_is_the_shifted_mean_and_output_is_a_mapping():
    model, x = small("LMM"), ids()
    labels = x.clone()
    labels[:, :4] = -100
    out = model(x, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), x[:, 4:].flatten())
    assert_close(out.loss, expected, "loss")
    assert out["loss"] is out.loss and set(out) == {"loss", "logits", "state"}
    assert "loss" not in model(x) and model(x).loss is None
    assert model(x[:, :1], labels=x[:, :1]).loss == 0
    assert model(x, logits_to_keep=2).logits.shape == (2, 2, VOCAB)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_file_goes_on_exactly_and_foreign_states_are_refused(variant, tmp_path, monkeypatch):
    model, x = small(variant), ids(tokens=10)
    out = model(x)
    out.state.save(tmp_path / "memory.safetensors")
    loaded = ModelState.load(tmp_path / "memory.safetensors")
    assert torch.equal(model(x, state=loaded).logits, model(x, state=out.state).logits)
    other = small(variant, chunk_size=8)
    with pytest.raises(ValueError, match="another configuration"):
        other(x, state=loaded)
    with torch.no_grad():
        model.norm.weight += 1
    with pytest.raises(ValueError, match="other weights"):
        model(x, state=loaded)
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a readable"):
        ModelState.load(tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ModelState.load(tmp_path / "absent")
    with monkeypatch.context() as patch:
        patch.setattr("titans.models.state.SEMANTICS", "2")
        out.state.save(tmp_path / "older")
    with pytest.raises(ValueError, match=r"older' was made for semantics 2 of its configuration, this is"):
        ModelState.load(tmp_path / "older")


@pytest.mark.parametrize("variant", ALL)
def test_save_and_load(variant, tmp_path):
    model, x = small(variant).float(), ids()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config.explicit()
    assert torch.equal(loaded(x).logits, model(x).logits)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "fields",
    [
        {"mem_head_dim": 24},
        {"mem_heads": 1, "mem_head_dim": 40, "mem_layers": 1, "d_hidden": None, "use_decay": False},
        {"mem_heads": 1, "chunk_size": 32, "use_momentum": False},
        {"theta_max": 0.3, "mem_head_dim": 24},
        {"miras": MirasConfig.moneta(), "mem_head_dim": 24, "d_hidden": None},
    ],
)
def test_what_a_file_spells_out_is_what_was_built(fields, tmp_path):
    """`explicit` and the layer find the same defaults, so that a loaded model computes what the saved one did."""
    model, x = small("MAG", **fields).float(), ids()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)
    again = build_model(model.config.explicit())
    caps = [[m.theta_max for m in built.modules() if isinstance(m, NeuralMemory)] for built in (model, again)]
    assert caps[0] == caps[1] != []


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(variant):
    x, grads = ids(), []
    for flag in (False, True):
        model = small(variant, gradient_checkpointing=flag).train()
        model(x, labels=x).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "gradient")


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_runs_and_keeps_the_memory_in_float32(variant):
    model, x = small(variant).float(), ids()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, labels=x)
    for layer in out.state.layers:
        memory = (layer if variant == "LMM" else layer.memory).memory
        assert {w.dtype for w in (*memory.weights, *memory.momentum)} == {torch.float32}
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert math.isfinite(out.loss.item())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m(torch.full((1, 3), VOCAB)), rf"input_ids must lie in 0\.\.{VOCAB - 1}, got {VOCAB}"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "non-empty"),
        (lambda m: m(torch.zeros(1, 3)), "input_ids must be integers"),
        (lambda m: m(ids(), labels=ids(tokens=3)), "labels must have"),
        (lambda m: m(ids(), attention_mask=torch.ones(2, 3)), "attention_mask must have"),
        (lambda m: m(ids(), state="x"), "state must be a ModelState"),
        (lambda m: m(ids(batch=3), state=m(ids()).state), "state has 2 rows, input_ids has 3"),
        (lambda m: m.generate(ids(), top_p=0), "top_p must lie"),
        (lambda m: m.generate(ids(), max_new_tokens=-1), "max_new_tokens must be"),
    ],
)
def test_errors_name_the_field(call, named):
    with pytest.raises(ValueError, match=named):
        call(small("MAC"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"d_modell": 3}, "d_modell"),
        ({"variant": "MAX"}, "variant"),
        ({"n_heads": 5}, "n_heads must divide d_model = 12, got 5"),
        ({"segment_len": 6}, "chunk_size must divide segment_len = 6, got 4"),
        ({"mem_layers": 3, "miras": MirasConfig.steady()}, "mem_layers = 3 contradicts miras"),
        ({"use_momentum": False, "miras": MirasConfig.titans()}, "use_momentum = False contradicts"),
        ({"d_hidden": 7}, "d_hidden must be a multiple"),
        ({"mem_head_dim": 0}, "mem_head_dim"),
    ],
)
def test_wrong_configurations_are_refused(fields, named):
    base = {"d_model": 12, "n_heads": 2, "mem_heads": 2, "chunk_size": 4}
    with pytest.raises(ValueError, match=named):
        TitansConfig(**{**base, **fields})


def test_config_survives_json_and_yaml(tmp_path):
    config = TitansConfig(variant="MAG", miras=MirasConfig.titans(), mem_layers=2)
    config.to_json(tmp_path / "c.json")
    config.to_yaml(tmp_path / "c.yaml")
    found = TitansConfig.from_json(tmp_path / "c.json")
    assert found == config.explicit() == TitansConfig.from_yaml(tmp_path / "c.yaml")
    assert found.explicit() == found
    config.vocab_size = 5
    with pytest.raises(ValueError, match="vocab_size"):
        config.vocab_size = 0


def test_constructors_build_a_config():
    model = TitansMAC(VOCAB, d_model=16, n_layers=1, mem_layers=1, chunk_size=8, n_persistent=0, use_momentum=True)
    assert model.config.rule.architecture.name == "matrix" and model.config.segment == 8
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())


SIZES = {"tiny": 30e6, "small": 170e6, "medium": 340e6, "base400": 400e6, "large": 760e6}


@pytest.mark.parametrize("variant", PRESET_LAYERS["tiny"])
@pytest.mark.parametrize("size", sorted(SIZES))
def test_presets_have_their_named_size(size, variant):
    with torch.device("meta"):
        model = build_model(getattr(TitansConfig, size)(variant=variant))
    assert abs(count_parameters(model) / SIZES[size] - 1) < 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_forget_empties_the_memory_and_nothing_else(variant):
    model, x = small(variant, n_persistent=0), ids(tokens=16)
    state = model(x[:, :8]).state
    emptied = state.forget()
    assert emptied.seen == state.seen
    after = model(x[:, 8:], state=emptied).logits
    assert (after - model(x[:, 8:], state=state).logits).abs().max() > 1e-6
    assert (after - model(x[:, 8:]).logits).abs().max() > 1e-6


@pytest.mark.parametrize("changes", [{}, *SETTINGS])
def test_the_segment_that_is_compiled_equals_the_ordinary_one(monkeypatch, changes):
    # The function itself, without torch.compile: that takes a minute (below).
    calls = []
    monkeypatch.setattr(
        mac, "_compiled_segment", lambda: lambda *inputs: calls.append(1) or mac.MACMixer.whole_segment(*inputs)
    )
    monkeypatch.setattr(chunked, "_compiled_chunk", lambda: chunked.whole_chunk)
    check_engines_agree(small("MAC", **changes))
    assert len(calls) == 2 * 2 * (2 + 2)  # modes, layers, whole segments of the two calls


@pytest.mark.slow
def test_the_compiled_segment_equals_the_ordinary_one():
    model, x, results = small("MAC"), ids(tokens=24), []
    for engine in ("chunked", "compiled"):
        model.set_engine(engine)
        model.zero_grad()
        out = model(x, labels=x)
        out.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([out.logits, *tensors(out.state), *gradients])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, "compiled")


def check_engines_agree(model):
    """Outputs, gradients and state of a stream in two calls, from its start and after a forgotten and a cut state."""
    x = ids(tokens=44)
    results = []
    for engine in ("chunked", "compiled"):
        model.set_engine(engine)
        found = []
        for change in (lambda s: s, lambda s: s.forget().detach()):
            model.zero_grad()
            first = model(x[:, :20])
            second = model(x[:, 20:], state=change(first.state))
            (first.logits.square().mean() + second.logits.square().mean()).backward()
            found += [first.logits, second.logits, *tensors(second.state)]
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append(torch.tensor(second.state.layers[0].memory.memory.count).double())
        results.append(found)
    for a, b in zip(*results, strict=True):
        assert_close(a, b, "compiled")


@pytest.mark.parametrize("variant", ALL)
def test_a_call_of_padding_alone_changes_nothing(variant):
    model, x = small(variant), ids()
    nothing = torch.zeros(2, 6)
    first = model(x[:, :13])
    idle = model(x[:, :6], attention_mask=nothing, state=first.state)
    assert idle.logits.abs().max() == 0
    assert_close(model(x[:, 13:], state=idle.state).logits, model(x).logits[:, 13:], "after padding")
    begun = model(x[:, :6], attention_mask=nothing)
    assert_close(model(x, state=begun.state).logits, model(x).logits, "after nothing but padding")


def test_the_reference_engine_generates():
    model, x = small("MAC"), ids(1, 9)
    expected = model.generate(x, 6, temperature=0)
    model.set_engine("reference")
    assert torch.equal(model.generate(x, 6, temperature=0), expected)
    with pytest.raises(ValueError, match="engine must be one of"):
        model.set_engine("bogus")


def test_a_frozen_model_builds_no_graph_in_any_engine(monkeypatch):
    monkeypatch.setattr(mac, "_compiled_segment", lambda: mac.MACMixer.whole_segment)
    model = small("MAC").requires_grad_(False)
    model.set_engine("compiled")
    assert not model(ids()).logits.requires_grad


@pytest.mark.parametrize("call", [
    lambda s: s.reset([2]), lambda s: s.reset([-1]), lambda s: s.reset([True, False]), lambda s: s.select([5]),
    lambda s: s.select(torch.tensor([False, True])),
])  # fmt: skip
def test_rows_of_a_state_are_checked(call):
    state = small("MAC")(ids()).state
    with pytest.raises(ValueError, match="rows must"):
        call(state)
    assert state.reset(torch.tensor([1])).seen == (21, 0)


def test_a_state_survives_pickle():
    model, x = small("MAG"), ids()
    state = pickle.loads(pickle.dumps(model(x[:, :13]).state.detach()))
    assert_close(model(x[:, 13:], state=state).logits, model(x).logits[:, 13:], "after pickle")


@pytest.mark.parametrize(("labels", "message"), [
    (torch.full((2, 21), VOCAB), "labels must lie"), (torch.zeros(2, 21), "labels must be int64"),
])  # fmt: skip
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        small("LMM")(ids(), labels=labels)


def test_a_tiny_temperature_takes_the_likeliest_token():
    model, x = small("LMM"), ids(1, 9)
    assert torch.equal(model.generate(x, 5, temperature=1e-40), model.generate(x, 5, temperature=0))


@pytest.mark.parametrize("variant", ["MAC", "MAL"])
@pytest.mark.parametrize("width", [64, 256])
def test_a_new_model_attends_to_each_token_as_much_as_to_all_others(variant, width):
    """An attention that averages makes all tokens the same, one that only sees itself would learn nothing."""
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant, vocab_size=VOCAB, d_model=width, n_heads=1, n_layers=1, chunk_size=32, window=32,
        attention_conv=0,
    )  # fmt: skip
    model = build_model(config)
    attention, x = model.blocks[0].mixer.attention, torch.randn(20, 32, width)
    queries, keys, _, _ = attention.project(x, None, Rows.whole((0,) * len(x), 32))
    scores = queries[:, -1, 0].unsqueeze(1) @ keys[:, :, 0].mT / width**0.5
    assert 0.3 < scores.softmax(-1)[..., -1].mean() < 0.7


@pytest.mark.parametrize("variant", ["transformer", "swa", "MAC", "MAG", "MAL"])
def test_new_attention_finds_what_followed_the_like_of_the_last_tokens(variant):
    """Keys start as the queries of the token before: it finds what followed the like of the last three."""
    torch.manual_seed(0)
    config = TitansConfig(variant=variant, vocab_size=VOCAB, d_model=64, n_heads=1, n_layers=1, chunk_size=32)
    attention, x = build_model(config).blocks[0].mixer.attention, torch.randn(20, 32, 64)
    x[:, 8:11] = x[:, -3:]
    queries, keys, _, _ = attention.project(x, None, Rows.whole((0,) * len(x), 32))
    scores = (queries[:, -1, 0].unsqueeze(1) @ keys[:, :, 0].mT).squeeze(1)
    assert (scores.argmax(-1) == 11).float().mean() > 0.8


def test_a_diverging_memory_stops_and_names_its_layer():
    model, x = small("LMM", miras=MirasConfig.titans(), d_hidden=None), ids()
    with torch.no_grad():
        model.blocks[1].mixer.branch.memory.initial_weights[0][0, 0, 0] = float("inf")
        with pytest.raises(FloatingPointError, match=r"blocks\.1 diverged within 24 tokens"):
            model(x)


def test_a_bias_that_is_a_plain_function_runs_but_cannot_be_saved(tmp_path):
    model, x = small("MAG", miras=MirasConfig(bias=torch.tanh), d_hidden=None), ids()
    state = model(x).state
    assert torch.isfinite(model(x, state=state).logits).all()
    with pytest.raises(ValueError, match="is a bare function"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_saved_model_says_its_rule_whatever_the_defaults_will_be(tmp_path):
    config = TitansConfig(vocab_size=VOCAB, d_model=16, n_layers=1, chunk_size=32)
    model = build_model(config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["miras"]["retention"]["name"] == MirasConfig.steady().retention.name
    assert written["theta_max"] == 1 / 16 / 2  # half the cap of chunks of 16
    assert load_model(tmp_path).fingerprint == model.fingerprint
    other = build_model(config.model_copy(update={"miras": MirasConfig.titans()}))
    assert other.fingerprint != model.fingerprint


@pytest.mark.parametrize("miras", [None, MirasConfig.titans(), MirasConfig.moneta()])
def test_a_state_file_fits_the_model_that_was_saved_and_loaded(miras, tmp_path):
    model = build_model(TitansConfig(vocab_size=VOCAB, d_model=16, n_layers=1, chunk_size=4, miras=miras))
    model(ids()).state.save(tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    state = ModelState.load(tmp_path / "state.safetensors")
    assert_close(again(ids(), state=state).logits, model(ids(), state=state).logits, "logits")


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
def test_attention_and_memory_pass_by_themselves_too(variant):
    """o = y ⊗ SiLU(m) + a ⊗ y + b ⊗ m, a and b 1 at first: each adds its branch alone, whatever the other found."""
    model, x, kept = small(variant, n_layers=1), ids(), {}
    mixer = model.blocks[0].mixer
    # MAC writes what its attention found, segment by segment: of 21 tokens in segments of 8 the last norm sees five.
    mixer.attention_norm.register_forward_hook(lambda module, inputs, output: kept.update(y=output))
    mixer.memory_norm.register_forward_hook(lambda module, inputs, output: kept.update(m=output))
    parts = {"neither": (0, 0), "y": (1, 0), "m": (0, 1)}
    with torch.no_grad():
        for through in (mixer.attention_through, mixer.memory_through):
            assert torch.equal(through, torch.ones_like(through))
        found = {}
        for name, (a, b) in parts.items():
            mixer.attention_through.fill_(a), mixer.memory_through.fill_(b)
            found[name] = mixer(model.embedding(x), None, Rows.whole((0, 0), x.shape[1]), None)[0]
    end = kept["y"].shape[1]
    y, m = kept["y"], kept["m"][:, -end:]
    assert_close(found["neither"][:, -end:], y * torch.nn.functional.silu(m))
    assert_close((found["y"] - found["neither"])[:, -end:], y)
    assert_close((found["m"] - found["neither"])[:, -end:], m)
