"""The Auto classes give back what was saved, and the adapter computes what the model computes."""

import copy
import json
import os
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from helpers import assert_close
from titans.hf import TitansCache, TitansForCausalLM, TitansHFConfig, TitansHFModel, register
from titans.miras import MirasConfig
from titans.models import TitansConfig, build_model, load_model
from titans.models.semantics import SEMANTICS


@pytest.mark.parametrize(
    ("variant", "tied"), [("LMM", True), ("MAC", False), ("MAG", True), ("MAL", False), ("transformer", True)]
)
def test_saved_and_loaded_by_the_auto_classes_it_is_the_same(tmp_path, make, ids, variant, tied):
    model = make(variant=variant, tie_embeddings=tied, miras=MirasConfig.titans())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TitansHFConfig)
    assert loaded.config.core() == model.config.core()
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == tied
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    # Loaded tensors lie otherwise aligned: not bit for bit, and the plain Titans rule magnifies rounding.
    assert_close(loaded(ids).logits, model(ids).logits, tolerance=1e-4)


@pytest.mark.parametrize("variant", ["LMM", "MAC", "MAG", "MAL", "transformer"])
def test_a_new_one_starts_as_a_new_model_does(variant):
    """transformers starts modules one by one, which would undo what their parents made of them."""
    config = TitansConfig(variant=variant, vocab_size=32, d_model=32, n_layers=1, chunk_size=8)
    torch.manual_seed(0)
    model = build_model(config)
    torch.manual_seed(0)
    adapter = TitansForCausalLM(TitansHFConfig(config))
    assert all(torch.equal(adapter.model.state_dict()[name], x) for name, x in model.state_dict().items())
    adapter.resize_token_embeddings(40)  # new rows are no zeros
    assert adapter.model.embedding.weight[32:].std() > 0


@pytest.mark.parametrize("made_for", ["2", None])
def test_a_folder_made_for_other_semantics_is_refused(tmp_path, make, made_for):
    """Its weights would load, or stay uninitialised, and compute something else."""
    make().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told.pop("semantics") == SEMANTICS
    (tmp_path / "config.json").write_text(json.dumps(told | ({"semantics": made_for} if made_for else {})))
    for read in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(ValueError, match=f"semantics {made_for or 1} of its configuration, this is {SEMANTICS}"):
            read(tmp_path)


@pytest.mark.parametrize(("change", "message"), [("lacks", "missing keys"), ("adds", "unexpected keys")])
def test_a_folder_with_other_tensors_is_refused(tmp_path, make, change, message):
    """transformers would leave what is missing uninitialised, after a warning."""
    make().save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.blocks.0.mixer.memory.conv.weight"
    tensors = tensors | {name + "s": tensors[name].clone()} if change == "adds" else tensors
    tensors = {n: t for n, t in tensors.items() if change == "adds" or n != name}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{message} {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        load_model(tmp_path)


def test_it_passes_everything_to_the_model_and_back(make, ids, mask):
    model = make()
    given = {"attention_mask": mask, "labels": ids, "store_mask": ids != 3, "output_hidden_states": True}
    out, expected = model(ids, **given), model.model(ids, **given)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out["logits"], expected.logits)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[1], expected.hidden_states[1])
    assert torch.equal(model(inputs_embeds=model.model.embedding(ids)).logits, model(ids).logits)
    assert "loss" not in model(ids) and model(ids)[0] is not None
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 64)
    documents = torch.arange(21).div(8, rounding_mode="floor").expand(2, 21)
    assert torch.equal(model(ids, document_ids=documents).logits, model.model(ids, document_ids=documents).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_auto_model_gives_what_the_head_reads(tmp_path, make, ids, mask, tied):
    model = make(tie_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    headless = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(headless) is TitansHFModel
    out = headless(ids, attention_mask=mask)
    assert list(out) == ["last_hidden_state", "past_key_values"] and out.state.seen == (15, 21)
    assert_close(model.model.head(out[0]), model(ids, attention_mask=mask).logits)
    assert_close(headless(ids[:, 9:], state=headless(ids[:, :9]).state)[0], headless(ids)[0][:, 9:])
    assert len(headless(ids, output_hidden_states=True).hidden_states) == 3
    with pytest.raises(TypeError, match="TitansHFModel has no head to generate with"):
        headless.generate(ids)
    headless.save_pretrained(tmp_path / "again")  # the same folder, its head included
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)


def test_a_state_or_a_cache_goes_on_where_it_stopped(make, ids):
    model = make()
    whole = model(ids).logits[:, 4:]
    first = model(ids[:, :4])
    assert_close(model(ids[:, 4:], state=first.state).logits, whole)
    assert first.state.seen == (4, 4)
    cache = first.past_key_values
    assert model(ids[:, 4:9], past_key_values=cache).past_key_values is cache
    assert_close(model(ids[:, 9:], past_key_values=cache).logits, whole[:, 5:])
    assert cache.get_seq_length() == 21


def test_without_a_cache_and_as_a_tuple(make, ids):
    model = make()
    out = model(ids, use_cache=False)
    assert list(out) == ["logits"] and out.state is None
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, out.logits) and isinstance(cache, TitansCache)
    model.config.use_cache = False
    assert list(model(ids)) == ["logits"]


def test_a_setting_is_changed_where_a_folder_is_opened(tmp_path, make, ids):
    make().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).use_cache
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=False)
    assert not model.config.use_cache and list(model(ids)) == ["logits"]


@pytest.mark.parametrize(("word", "meant"), [("d_modle", "d_model"), ("hiden_size", "hidden_size"), ("foo", None)])
def test_a_word_that_nobody_knows_is_refused_by_name(tmp_path, word, meant):
    message = f"{word}.*did you mean '{meant}'" if meant else f"has no field '{word}'$"
    told = {"model_type": "titans", "semantics": SEMANTICS, word: 8}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for read in (
        lambda: TitansHFConfig(**{word: 8}),
        lambda: TitansHFConfig(TitansConfig(), **{word: 8}),
        lambda: TitansHFConfig.from_dict(told),
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.for_model("titans", **{word: 8}),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_what_transformers_passes_along_is_no_unknown_word(tmp_path, make):
    told = dict(  # noqa: C408
        pad_token_id=0, eos_token_id=0, bos_token_id=0, dtype="float32", num_labels=3, id2label={0: "a"},
        attn_implementation="sdpa", name_or_path="x", output_hidden_states=True, return_dict=True, use_cache=False,
        architectures=["TitansForCausalLM"], temperature=0.5, max_length=9, num_beams=2, _commit_hash="x",
        problem_type=None, output_attentions=False, torch_dtype="float32", label2id={"a": 0}, is_encoder_decoder=False,
        max_position_embeddings=99,
    )  # fmt: skip
    for name, value in told.items():
        TitansHFConfig(TitansConfig(), **{name: value})
    model = make()
    model.config.note = "mine"  # what is set on a configuration and saved is no misspelling
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation="eager", use_cache=False)
    assert again.config.note == "mine" and not again.config.use_cache
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=False, revision="main").note == "mine"
    assert TitansHFConfig(**model.config.to_dict()).core() == copy.deepcopy(model.config).core() == again.config.core()


def test_what_goes_to_the_hub_is_the_whole_folder(tmp_path, make, monkeypatch):
    """There is no hub here: what would go up is what transformers hands to it."""
    sent = []
    monkeypatch.setattr(
        TitansForCausalLM,
        "_upload_modified_files",
        lambda self, folder, repo, known, **told: sent.append((repo, set(os.listdir(folder)) - set(known))),
    )
    hub = types.SimpleNamespace(create_repo=lambda name, **told: types.SimpleNamespace(repo_id=name))
    for name, stub in (("hf_api", lambda: hub), ("create_repo", hub.create_repo)):  # either, by the release
        monkeypatch.setattr(f"transformers.modeling_utils.{name}", stub, raising=False)
    make().save_pretrained(tmp_path / "mine", push_to_hub=True)
    files = {"config.json", "generation_config.json", "model.safetensors", "modeling_titans.py", "README.md"}
    assert sent == [("mine", files)] and set(os.listdir(tmp_path / "mine")) == files


def test_a_mask_over_the_whole_text_serves_in_decoding(make, ids, mask):
    model = make()
    cache = model(ids[:, :20], attention_mask=mask[:, :20]).past_key_values
    last = model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits
    assert_close(last, model(ids, attention_mask=mask).logits[:, 20:])
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \[2, 21\], got \[2, 3\]"):
        model(ids, attention_mask=mask[:, :3])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"position_ids": torch.zeros(2, 21)}, TypeError, "takes no position_ids"),
        ({"output_attentions": True}, TypeError, "takes no output_attentions"),
        ({"atention_mask": None, "lables": 1}, TypeError, "takes no lables"),
        ({"past_key_values": DynamicCache()}, ValueError, r"TitansCache \(no prefix tuning\), got DynamicCache"),
        ({"past_key_values": TitansCache(), "state": 1}, ValueError, "state or past_key_values, got both"),
    ],
)
def test_what_it_cannot_use_is_refused_in_one_line(make, ids, given, error, message):
    with pytest.raises(error, match=message):
        make()(ids, **given)


def test_what_tools_pass_along_is_let_through(make, ids):
    model = make()
    given = {"token_type_ids": torch.zeros_like(ids), "position_ids": None, "output_attentions": False}
    assert torch.equal(model(ids, **given).logits, model(ids).logits)


def test_a_configuration_is_built_from_fields_under_either_name():
    config = AutoConfig.for_model("titans", vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    assert config.core() == TitansConfig(vocab_size=100, d_model=64, n_layers=3, n_heads=4)
    assert (config.hidden_size, config.num_attention_heads, config.tie_word_embeddings) == (64, 4, True)
    assert config.max_position_embeddings >= 2**30  # what tools cut texts to
    config.vocab_size = 300
    assert AutoModelForCausalLM.from_config(config).model.embedding.num_embeddings == 300
    with pytest.raises(ValueError, match="d_model"):
        AutoConfig.for_model("titans", d_model=-1)
    register()
    register()
    assert AutoConfig.for_model("titans").core() == TitansConfig()


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_survives_the_folder(tmp_path, make, ids, tied):
    model = make(tie_embeddings=tied)
    before = model(ids).logits
    model.resize_token_embeddings(70)
    after = model(ids).logits
    assert_close(after[..., :64], before)
    assert (model.config.vocab_size, model.model.config.vocab_size, after.shape[-1]) == (70, 70, 70)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    for read in (AutoModelForCausalLM.from_pretrained, load_model):
        assert_close(read(tmp_path)(ids).logits, after)
    assert model(torch.full((1, 3), 69)).logits.isfinite().all()


def test_gradient_checkpointing_by_transformers_name_changes_no_gradient(make, ids):
    gradients = []
    for enable in (False, True):
        model = make().train()
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert model.is_gradient_checkpointing == enable
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.embedding.weight.grad)
    model.gradient_checkpointing_disable()
    assert_close(*gradients)
    assert not model.model.config.gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_loads_in_a_lower_precision(tmp_path, make, ids, dtype):
    model = make()
    model.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert low.dtype == low(ids).logits.dtype == dtype
    assert_close(low(ids).logits.float(), model(ids).logits, tolerance=0.2)
    low.save_pretrained(tmp_path / "low")
    assert load_model(tmp_path / "low").embedding.weight.dtype == torch.float32


def test_it_starts_on_the_meta_device_and_copies(make, ids):
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(make().config).device.type == "meta"
    model = make()
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_a_part_on_disk_is_refused(tmp_path, make):
    make().save_pretrained(tmp_path)
    places = {"model.embedding": "cpu", "model.head": "cpu", "model.norm": "cpu", "model.blocks.0": "cpu"}
    with pytest.raises(ValueError, match="cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map={**places, "model.blocks.1": "disk"}, offload_folder=tmp_path / "off"
        )


def test_settings_that_the_built_model_does_not_have_are_not_saved(make, tmp_path):
    """The folder would compute something else, under a digest that says all is well."""
    model = make()
    model.config.segment_len = 4
    with pytest.raises(ValueError, match=r"config\.segment_len: the model is built with 8, got 4"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, -3, 1.5])
def test_a_vocabulary_that_cannot_be_is_refused(make, ids, size):
    model = make()
    before = model(ids).logits
    with pytest.raises(ValueError, match=f"new_num_tokens must be an integer of at least 1, got {size}"):
        model.resize_token_embeddings(size)
    assert torch.equal(model(ids).logits, before)
