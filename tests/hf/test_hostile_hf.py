"""Hostile cases behind transformers' doors: no wrong token in silence, no folder that is not what was saved."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from decoders import opened, pretrained
from titans.evaluation.grafted import GraftedModel
from titans.files import hash_tensors
from titans.hf import TitansCache, TitansHFConfig, graft, load_graft, save_graft
from titans.models import load_model

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FILE = "titans_graft.safetensors"


@pytest.mark.parametrize("variant", ["MAC", "swa"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_a_state_goes_on_without_a_cache_too(make, ids, variant, more):
    model = make(variant=variant)
    state = model(ids).state
    wanted = model.generate(ids[:, :5], state=state, **GREEDY, **more)
    assert torch.equal(model.generate(ids[:, :5], state=state, use_cache=False, **GREEDY, **more), wanted)
    without = GenerationConfig(use_cache=False, **GREEDY, **more)
    assert torch.equal(model.generate(ids[:, :5], state=state, generation_config=without), wanted)


def test_a_cache_that_is_left_out_stays_as_it_was(make, ids):
    model, cache = make(), TitansCache()
    model(ids, past_key_values=cache)
    before, columns = cache.state, cache.columns
    assert model(ids, past_key_values=cache, use_cache=False).past_key_values is None
    assert cache.state is before and cache.columns == columns
    with pytest.raises(ValueError, match="past_key_values: use_cache=False"):
        model.generate(torch.cat((ids, ids), 1), past_key_values=cache, use_cache=False, **GREEDY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda state: {"state": state, "past_key_values": TitansCache()}, "give state or past_key_values, got both"),
        (
            lambda state: {"attention_mask": torch.ones(2, 5)},
            r"attention_mask must be of \[2, 21\] tokens, got \[2, 5\]",
        ),
        (lambda state: {"attention_mask": torch.ones(2, 30)}, "attention_mask must be"),
    ],
)
def test_generation_drops_nothing_in_silence(make, ids, given, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **given(model(ids).state), **GREEDY)


def test_weights_of_another_size_are_not_left_to_chance(make, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mismatched keys model\.embedding\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=90, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("two", [{"hidden_size": 64, "d_model": 32}, {"n_heads": 2, "num_attention_heads": 4}])
def test_one_field_has_one_value(two):
    with pytest.raises(ValueError, match="are one field, got"):
        TitansHFConfig(**two)


def forge(file, change):
    """Change a file of memories and give it the hash of what it then holds."""
    tensors = load_file(file)
    with safe_open(file, "pt") as whole:
        told = whole.metadata()
    del told["hash"]
    change(tensors, told)
    save_file(tensors, file, {**told, "hash": hash_tensors(tensors, told)})


def test_a_flipped_bit_of_memories_is_noticed(tmp_path):
    save_graft(opened("llama"), tmp_path)
    whole = bytearray((tmp_path / FILE).read_bytes())
    for at in (len(whole) - 3, len(whole) // 2, 300):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (tmp_path / FILE).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{FILE}"):
            load_graft(pretrained("llama"), tmp_path)
    (tmp_path / FILE).write_bytes(whole)
    load_graft(pretrained("llama"), tmp_path)


@pytest.mark.parametrize(
    "told", ["{}", "[1]", "null", '{"family": "llama"}', '{"family": 1, "layers": 2}', "{", "[" * 9999]
)
def test_what_memories_say_of_themselves_is_checked(tmp_path, told):
    save_graft(opened("llama"), tmp_path)
    forge(tmp_path / FILE, lambda tensors, words: words.update(titans_graft=told))
    with pytest.raises(ValueError, match=FILE):
        load_graft(pretrained("llama"), tmp_path)


def test_memories_belong_to_one_pretrained_model(tmp_path):
    save_graft(opened("llama"), tmp_path)
    other = pretrained("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight += 1
    for wrong in (other, pretrained("qwen3")):
        with pytest.raises(ValueError, match="was saved beside another pretrained model"):
            load_graft(wrong, tmp_path)
    half = load_graft(pretrained("llama").to(torch.bfloat16), tmp_path)
    assert half.dtype == torch.bfloat16
    forge(tmp_path / FILE, lambda tensors, told: tensors.update({"2.gate": tensors["2.gate"] * float("nan")}))
    with pytest.raises(ValueError, match="not finite"):
        load_graft(pretrained("llama"), tmp_path)


@pytest.mark.parametrize("field", ["rms_norm_eps", "hidden_act", "rope_parameters", "titans_graft"])
def test_settings_of_a_decoder_are_settings(tmp_path, field):
    opened("llama").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    new = {"rms_norm_eps": 0.5, "hidden_act": "relu", "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    told[field] = new.get(field, {**told["titans_graft"], "layers": [1]})
    (tmp_path / "config.json").write_text(json.dumps(told))
    for read in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="was edited|missing keys"):
            read(tmp_path)


@pytest.mark.parametrize("graft_says", [None, "x", {}, {"family": "llama", "layers": 3}])
def test_a_grafted_folder_says_what_is_grafted(tmp_path, graft_says):
    opened("llama").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    del told["digest"]
    told["titans_graft"] = graft_says
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="titans_graft must have family, layers, memory, semantics"):
        load_model(tmp_path)


@pytest.mark.parametrize("layers", [[True], [1.0], ["1"]])
def test_layers_are_numbers(layers):
    with pytest.raises(ValueError, match="layers must be"):
        graft(pretrained("llama"), layers)


WRONG = {
    "input_ids float": lambda m, ids: m(ids.float()), "input_ids none": lambda m, ids: m(ids[:, :0]),
    "input_ids row": lambda m, ids: m(ids[0]), "input_ids list": lambda m, ids: m([[1]]),
    "input_ids low": lambda m, ids: m(ids - 99), "labels high": lambda m, ids: m(ids, labels=ids + 999),
    "labels float": lambda m, ids: m(ids, labels=ids.float()), "labels few": lambda m, ids: m(ids, labels=ids[:1]),
    "attention_mask long": lambda m, ids: m(ids, attention_mask=torch.ones(2, 40)),
    "attention_mask nan": lambda m, ids: m(ids, attention_mask=ids * float("nan")),
    "store_mask 2": lambda m, ids: m(ids, store_mask=ids * 0 + 2),
    "logits_to_keep": lambda m, ids: m(ids, logits_to_keep=-1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_grafted_model_names_what_is_wrong(ids, name):
    with pytest.raises(ValueError, match=name.split()[0]):
        WRONG[name](GraftedModel(opened("llama")), ids)
