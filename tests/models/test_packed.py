"""Several documents in a row: each as if it stood alone; states put where streams stand elsewhere; models from meta."""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers import assert_close
from tiny import ALL, SETTINGS, VARIANTS, VOCAB, ids, small
from titans import MirasConfig, TitansConfig, build_model

DOCUMENTS = [[9, 3, 1, 12], [25]]  # tokens of each row's documents
LENGTH = 25


def documents():
    """Document ids [2, 25]; the second row is one document."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS])


def pieces(x, row):
    return x[row : row + 1].split(DOCUMENTS[row], 1)


def check_packed(model, flags=None):
    x, store = ids(tokens=LENGTH), {} if flags is None else {"store_mask": flags}
    packed = model(x, labels=x, document_ids=documents(), **store)
    logits, total, targets = [], 0, 0
    for row in range(2):
        alone = []
        for i, piece in enumerate(pieces(x, row)):
            mine = {n: pieces(f, row)[i] for n, f in store.items()}
            out = model(piece, labels=piece, **mine)
            alone.append(out.logits)
            total = total + out.loss * (piece.shape[1] - 1)
            targets += piece.shape[1] - 1
        logits.append(torch.cat(alone, 1))
    assert_close(packed.logits, torch.cat(logits), "logits")
    assert_close(packed.loss, total / targets, "loss")
    parameters = dict(model.named_parameters())
    together = torch.autograd.grad(packed.loss, parameters.values(), allow_unused=True, materialize_grads=True)
    apart = torch.autograd.grad(total / targets, parameters.values(), allow_unused=True, materialize_grads=True)
    for name, a, b in zip(parameters, together, apart, strict=True):
        assert_close(a, b, f"gradient of {name}")
    # The state is that of the last documents.
    y = ids(tokens=7, seed=3)
    on = model(y, state=packed.state).logits
    for row in range(2):
        last = model(pieces(x, row)[-1], **({n: pieces(f, row)[-1] for n, f in store.items()})).state
        assert packed.state.seen[row] == last.seen[0]
        assert_close(on[row : row + 1], model(y[row : row + 1], state=last).logits, f"row {row}, going on")


@pytest.mark.parametrize("variant", ALL)
def test_packed_documents_equal_each_alone(variant):
    check_packed(small(variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", SETTINGS)
def test_packed_documents_under_other_settings(variant, changes):
    if variant != "MAC":
        changes = {name: value for name, value in changes.items() if name != "n_memory_tokens"}
    check_packed(small(variant, **changes), torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7)


@pytest.mark.parametrize(
    "rule", [MirasConfig.moneta(), MirasConfig.memora(), MirasConfig(algorithm="muon", gates="channel")]
)
@pytest.mark.parametrize("variant", ["LMM", "MAC"])
def test_packed_documents_under_other_rules(variant, rule):
    check_packed(small(variant, miras=rule, d_hidden=None))


@pytest.mark.parametrize("variant", ALL)
def test_the_first_document_goes_on_from_a_state_between_padding(variant):
    model, x = small(variant), ids(tokens=LENGTH)
    first = ids(tokens=6, seed=4)
    state = model(first).state
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    out = model(x, state=state, attention_mask=mask, document_ids=documents())
    for row in range(2):
        parts, masks = pieces(x, row), pieces(mask, row)
        found, expected = out.logits[row][mask[row]], []
        for i, (part, kept) in enumerate(zip(parts, masks, strict=True)):
            if kept.any():
                before = state.select([row]) if i == 0 else None
                expected.append(model(part[kept].unsqueeze(0), state=before).logits[0])
        assert_close(found, torch.cat(expected), f"row {row}")


@pytest.mark.parametrize("variant", ALL)
def test_the_reference_engine_packs_as_well(variant):
    model, x = small(variant), ids(tokens=LENGTH)
    expected = model(x, document_ids=documents()).logits
    if model.config.has_memory:
        model.set_engine("reference")
    assert_close(model(x, document_ids=documents()).logits, expected, "reference")


def test_wrong_document_ids_are_named():
    with pytest.raises(ValueError, match="document_ids must be integers"):
        small("LMM")(ids(), document_ids=torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(("old", "new"), [(21, 10), (16, 3), (5, 24), (8, 8)])
def test_rows_are_put_wherever_their_streams_stand(variant, old, new):
    model = small(variant)
    streams, request = model(ids(3, old)).state, model(ids(1, new, seed=7)).state
    joined = streams.put([1], request)
    y = ids(3, 9, seed=8)
    out = model(y, state=joined)
    for row, state in enumerate([streams.select([0]), request, streams.select([2])]):
        assert_close(out.logits[row : row + 1], model(y[row : row + 1], state=state).logits, f"row {row}")


def test_put_refuses_what_does_not_fit():
    model = small("MAG")
    state = model(ids()).state
    with pytest.raises(ValueError, match="another configuration"):
        state.put([0], small("MAG", chunk_size=8)(ids(1)).state)
    with pytest.raises(ValueError, match=r"rows must lie in 0\.\.1, got 5"):
        state.put([5], model(ids(1)).state)
    with pytest.raises(ValueError, match="put needs a state of 1 rows, got 2"):
        state.put([0], state)
    other = small("MAG", d_hidden=24)(ids(1)).state.layers[0]
    with pytest.raises(ValueError, match=r"state\.memory\.memory\.weights\[0\]: the states' shapes differ"):
        state.layers[0].put([0], other)


@pytest.mark.parametrize("variant", ALL)
def test_a_model_from_the_meta_device_equals_one_built_in_place(variant):
    config = TitansConfig(
        variant=variant, vocab_size=VOCAB, d_model=16, n_layers=2, n_persistent=2, chunk_size=4, segment_len=8,
        window=5, n_memory_tokens=2 if variant == "MAC" else 0, tie_embeddings=variant != "MAG",
        miras=MirasConfig(algorithm="muon", gates="channel", bias={"name": "huber", "delta": "learned"}),
    )  # fmt: skip
    torch.manual_seed(3)
    built = build_model(config)
    with torch.device("meta"):
        later = build_model(config)
    later.to_empty(device="cpu")
    with torch.no_grad():
        for p in later.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(3)
    later.reset_parameters()
    expected = built.state_dict()
    for name, value in later.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_of_every_memory_fire(variant):
    from titans import NeuralMemory

    model, fired = small(variant), []
    for name, module in model.named_modules():
        if isinstance(module, NeuralMemory):
            module.register_forward_hook(lambda *_, name=name: fired.append(name))
    model(ids())
    assert len(set(fired)) == 2


@pytest.mark.parametrize("variant", ["LMM", "MAC"])
def test_a_bfloat16_copy_takes_the_float32_state(variant, tmp_path):
    from titans.models import ModelState

    model, x = small(variant).float(), ids()
    model(x).state.save(tmp_path / "state")
    copy = build_model(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    assert torch.isfinite(copy(x, state=ModelState.load(tmp_path / "state")).logits).all()


def test_a_state_belongs_to_the_weights_that_made_it(tmp_path):
    from titans.models import ModelState, load_model

    model, x = small("MAC").float(), ids()
    model.save_pretrained(tmp_path / "model")
    load_model(tmp_path / "model")(x).state.save(tmp_path / "state")  # the model is gone, the state is not
    state = model(x).state.detach()
    with torch.no_grad():
        model.norm.weight += 1
    with pytest.raises(ValueError, match="weights have changed since this state was made"):
        state.save(tmp_path / "late")
    mixed = model(x, state=state).state
    mixed.save(tmp_path / "mixed")
    with pytest.raises(ValueError, match="other weights"):
        model(x, state=ModelState.load(tmp_path / "mixed"))
    assert_close(
        load_model(tmp_path / "model")(x, state=ModelState.load(tmp_path / "state")).logits,
        load_model(tmp_path / "model")(x, state=load_model(tmp_path / "model")(x).state).logits,
        tolerance=0,
    )


def test_states_refuse_dtypes_that_hold_no_weights():
    with pytest.raises(ValueError, match=r"floating-point dtype of 16 to 64 bits, got torch\.int8"):
        small("LMM")(ids()).state.to(torch.int8)


def test_forks_go_on_like_their_origin():
    model, x = small("MAC"), ids()
    state = model(x).state
    y = ids(6, 5, seed=9)
    out = model(y, state=state.fork(3))
    for row in range(6):
        assert_close(out.logits[row : row + 1], model(y[row : row + 1], state=state.select([row // 3])).logits, "fork")


@pytest.mark.parametrize("changes", [{"miras": "memora"}, {"miras": {"algorithm": "muon"}}])
def test_a_rule_that_hides_the_writes_of_long_chunks_says_so(changes):
    config = TitansConfig(variant="LMM", vocab_size=VOCAB, d_model=16, n_layers=1, chunk_size=32, **changes)
    with pytest.warns(UserWarning, match="with chunk_size = 32 nothing of the last 31 tokens"):
        build_model(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(config.model_copy(update={"chunk_size": 8}))


def test_a_network_of_ones_own_says_how_deep_it_is():
    from titans import NeuralMemory
    from titans.miras import Network

    class FourMaps(Network):
        name = "four_maps"

        def shapes(self, width):
            return ((2, width), (width, 2), (2, width), (width, 2))

        def forward(self, x, apply):
            return apply(3, apply(2, apply(1, apply(0, x))))

        def errors(self, error, outputs, transpose):
            found = [error]
            for i in (3, 2, 1):
                found.append(transpose(i, found[-1]))
            return tuple(reversed(found))

    rule = MirasConfig(architecture=FourMaps(), retention="weight_decay")
    layer = NeuralMemory(12, n_layers=4, n_heads=2, chunk_size=4, miras=rule).double()
    assert layer(torch.randn(1, 9, 12, dtype=torch.float64)).shape == (1, 9, 12)
    Network.members.pop("four_maps")
