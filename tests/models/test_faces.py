"""A call's face: keyword-only arguments, embeddings instead of ids, hidden states, outputs by place, end tokens."""

import inspect

import pytest
import torch

from helpers import assert_close
from tiny import ALL, VOCAB, ids, small
from titans import TitansConfig, TitansLMM, TitansMAC, TitansModel, build_model, load_model
from titans.hf import TitansForCausalLM, TitansHFConfig
from titans.layers.neural_memory import NeuralMemory
from titans_miras import MACTransformer, TransformerConfig


def masked():
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    return mask


def test_everything_after_the_ids_is_keyword_only_under_the_same_names():
    core, adapter, drop_in = (
        list(inspect.signature(kind.forward).parameters.values())[1:]
        for kind in (TitansModel, TitansForCausalLM, MACTransformer)
    )
    for parameters in (core, adapter, drop_in):
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters[1:])
    assert [p.name for p in adapter][: len(core)] == [p.name for p in core]
    with pytest.raises(TypeError, match="positional"):
        small("MAC")(ids(), masked())


@pytest.mark.parametrize("variant", ALL)
def test_embeddings_are_read_as_the_ids_they_stand_for(variant):
    model, x, mask = small(variant), ids(), masked()
    documents = torch.arange(21).div(8, rounding_mode="floor").expand(2, 21)
    given = {"attention_mask": mask, "labels": x, "document_ids": documents, "store_mask": (x != 3)}
    expected, found = model(x, **given), model(inputs_embeds=model.embedding(x), **given)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    first = model(inputs_embeds=model.embedding(x[:, :9]))
    assert_close(model(x[:, 9:], state=first.state).logits, model(x).logits[:, 9:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give input_ids or inputs_embeds, got neither"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long), "inputs_embeds": torch.zeros(1, 2, 12)}, "got both"),
        ({"inputs_embeds": torch.zeros(1, 2, 11)}, r"non-empty \[B, T, 12\], got \[1, 2, 11\]"),
        ({"inputs_embeds": torch.zeros(2, 12)}, r"got \[2, 12\]"),
    ],
)
def test_what_can_not_be_read_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        small("LMM")(**given)


def test_hidden_states_are_those_of_the_blocks_and_of_the_head():
    model, x, mask, seen = small("MAC"), ids(), masked(), []
    model.blocks[1].register_forward_hook(lambda module, given, found: seen.append(given[0]))
    out = model(x, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and "hidden_states" not in model(x)
    assert torch.equal(out.hidden_states[1][1], seen[0][1])
    assert not out.hidden_states[0][0, :6].any()
    assert torch.equal(out.hidden_states[0][0, 6:], model.embedding(x)[0, 6:])
    assert_close(model.head(out.hidden_states[-1]), out.logits)


def test_outputs_by_place_as_those_of_transformers():
    model, x = small("LMM"), ids()
    out = model(x, labels=x)
    loss, logits, state = out.to_tuple()
    assert loss is out[0] is out["loss"] and logits is out[1] and state is out.state
    assert out[:2] == (loss, logits) and list(out) == ["loss", "logits", "state"]
    assert model(x)[0].shape == (2, 21, VOCAB)


def test_outputs_agree_over_the_faces():
    """Ours and transformers' unpack into names, as a dictionary does; ``to_tuple`` gives the values. The drop-in gives
    what its original gives, a tensor or a pair."""
    x = ids()
    adapter = TitansForCausalLM(TitansHFConfig(TitansConfig(vocab_size=VOCAB, d_model=8, n_layers=1, chunk_size=4)))
    for model, last in ((adapter.model, "state"), (adapter, "past_key_values")):
        out = model(x, labels=x)
        first, second, third = out
        assert (first, second, third) == tuple(out.keys()) == ("loss", "logits", last)
        assert all(a is b is c for a, b, c in zip(out.to_tuple(), out[:], out.values(), strict=True))
        assert out[0] is out.loss is out["loss"] and out[1] is out.logits and len(out) == 3
        logits, _ = model(x).to_tuple()
        assert logits.shape == (2, 21, VOCAB)
    drop_in = MACTransformer(config=TransformerConfig(num_tokens=VOCAB, dim=8, depth=1, segment_len=4))
    logits, state = drop_in(x, return_state=True)
    assert torch.equal(logits, drop_in(x)) and state.seen == (21, 21)


def test_losses_of_uneven_calls_add_up_to_that_of_one():
    model, x = small("MAG"), ids()
    labels = x.clone()
    labels[0, :17] = -100
    whole, count = model(x, labels=labels).loss, (labels[:, 1:] != -100).sum()
    parts = [model(x[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(2)]
    assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("ends", [[3, 5], (5, 3), torch.tensor([3, 5])])
def test_any_of_several_tokens_ends_a_row(ends):
    model, x = small("LMM"), ids()
    free = model.generate(x, max_new_tokens=40, generator=torch.Generator().manual_seed(0))
    assert all(bool(torch.isin(row, torch.tensor([3, 5])).any()) for row in free[:, 21:])
    out = model.generate(x, max_new_tokens=40, eos_token_id=ends, generator=torch.Generator().manual_seed(0))
    for row in out[:, 21:]:
        stop = int(torch.isin(row, torch.tensor([3, 5])).nonzero()[0])
        assert (row[stop + 1 :] == int(ends[0])).all()
    single = [model.generate(x, max_new_tokens=5, temperature=0, eos_token_id=e) for e in (7, [7])]
    assert torch.equal(*single)
    with pytest.raises(ValueError, match="at least one id"):
        model.generate(x, eos_token_id=[])


def test_a_built_models_configuration_does_not_change_unseen():
    config = TitansConfig(vocab_size=VOCAB, d_model=8, n_layers=1, chunk_size=4)
    model = build_model(config)
    with pytest.raises(ValueError, match="chunk_size: the model is built.* got 2"):
        model.config.chunk_size = 2
    model.config.gradient_checkpointing = True
    config.chunk_size = 2  # the caller's own is the caller's
    other = model.config.model_copy(update={"n_layers": 2})
    other.chunk_size = 2
    assert (model.config.chunk_size, other.chunk_size) == (4, 2)


def test_configurations_are_equal_that_mean_the_same(tmp_path):
    config = TitansConfig(vocab_size=VOCAB, d_model=16, n_layers=1, chunk_size=4, mem_layers=1)
    config.to_json(tmp_path / "c.json")
    config.to_yaml(tmp_path / "c.yaml")
    assert TitansConfig.from_json(tmp_path / "c.json") == config == TitansConfig.from_yaml(tmp_path / "c.yaml")
    assert config != TitansConfig(vocab_size=VOCAB, d_model=16, n_layers=1, chunk_size=4)
    assert config != "titans"


def test_the_engine_is_an_argument():
    config = TitansConfig(vocab_size=VOCAB, d_model=8, n_layers=1, chunk_size=4)
    for model in (build_model(config, engine="reference"), TitansMAC(VOCAB, 8, 1, chunk_size=4, engine="reference")):
        assert {m.engine for m in model.modules() if isinstance(m, NeuralMemory)} == {"reference"}
    with pytest.raises(ValueError, match="engine"):
        build_model(config, engine="fast")


def test_a_folder_of_another_variant_is_refused(tmp_path):
    model = TitansLMM(VOCAB, d_model=8, n_layers=1, chunk_size=4)
    model.save_pretrained(tmp_path)
    assert not isinstance(TitansMAC(VOCAB, d_model=8, n_layers=1, chunk_size=4), TitansLMM)
    assert isinstance(load_model(tmp_path), TitansLMM)
    with pytest.raises(ValueError, match="holds a TitansLMM, not a TitansMAC"):
        TitansMAC.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["LMM", "swa"])
def test_the_model_is_exported_at_one_length(variant):
    model = small(variant, n_layers=1, mem_heads=1).float().requires_grad_(False)
    exported = torch.export.export(model, (ids(batch=1),)).module()
    other = ids(batch=1, seed=2)
    assert_close(exported(other).logits, model(other).logits)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_stands_at_padding_does_nothing_to_gradients_either(padding):
    model = small("MAC")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 4) if padding == "left" else slice(5, 9)] = 0
    found = []
    for value in (0.0, float("nan")):
        vectors = model.embedding(ids(2, 9)).detach().masked_fill(mask[..., None] == 0, value).requires_grad_()
        model.zero_grad()
        out = model(inputs_embeds=vectors, attention_mask=mask, labels=ids(2, 9))
        out.loss.backward()
        found.append([out.loss.detach(), vectors.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *found))
