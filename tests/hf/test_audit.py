"""Calls that a user of transformers makes, and that an audit found refused or wrong: each works, or says why not.

What the audit found elsewhere is tested elsewhere: folders and tokenizers in training/test_folders.py, generation in
test_generate.py, PEFT and the Trainer in test_trainer.py, lm-eval in evaluation/test_lm_eval.py, compile and export in
models/test_decoding_graph.py.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers import assert_close
from tiny import VARIANTS
from titans.hf import TitansForCausalLM

GREEDY = {"max_new_tokens": 4, "do_sample": False}
SAME = {  # ways to ask for the same tokens
    "ids by name": lambda model, ids: model.generate(inputs=ids, **GREEDY),
    "input_ids": lambda model, ids: model.generate(input_ids=ids, **GREEDY),
    "no streamer": lambda model, ids: model.generate(ids, streamer=None, **GREEDY),
    "a configuration": lambda model, ids: model.generate(ids, generation_config=GenerationConfig(**GREEDY)),
    "one beam": lambda model, ids: model.generate(ids, num_beams=1, **GREEDY),
    "max_length": lambda model, ids: model.generate(ids, max_length=25, do_sample=False),
    "a dictionary": lambda model, ids: model.generate(ids, return_dict_in_generate=True, **GREEDY).sequences,
    "the dynamic cache": lambda model, ids: model.generate(ids, cache_implementation="dynamic", **GREEDY),
    "no cache": lambda model, ids: model.generate(ids, use_cache=False, **GREEDY),
}
ALIKE = {  # calls that give the same logits
    "token_type_ids": lambda model, ids: model(ids, token_type_ids=torch.zeros_like(ids)),
    "cache_position": lambda model, ids: model(ids, cache_position=torch.arange(21)),
    "no position_ids": lambda model, ids: model(ids, position_ids=None),
    "use_cache": lambda model, ids: model(ids, use_cache=True),
    "a longer mask": lambda model, ids: model(ids, attention_mask=torch.ones(2, 30)),
    "embeddings": lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids)),
    "checkpointing": lambda model, ids: (model.gradient_checkpointing_enable(every=1), model.train()(ids))[1],
    "tied again": lambda model, ids: (model.tie_weights(), model(ids))[1],
}
REFUSED = {
    "static": (
        lambda m, ids: m.generate(ids, cache_implementation="static", **GREEDY),
        "cache_implementation: .*'st",
    ),
    "quantized": (
        lambda m, ids: m.generate(ids, cache_implementation="quantized", **GREEDY),
        "cache_implementation: ",
    ),
    "assisted": (lambda m, ids: m.generate(ids, assistant_model=m), "not supported with stateful models"),
    "lookup": (lambda m, ids: m.generate(ids, prompt_lookup_num_tokens=2), "not supported with stateful models"),
    "typo": (lambda m, ids: m.generate(ids, max_new_tokns=2), "max_new_tokns"),
}


@pytest.mark.parametrize("way", SAME)
def test_one_continuation_asked_for_in_many_ways(make, ids, way):
    expected = make().generate(ids, **GREEDY)
    assert torch.equal(SAME[way](make(), ids), expected)


@pytest.mark.parametrize("way", ALIKE)
def test_one_call_written_in_many_ways(make, ids, way):
    assert_close(ALIKE[way](make(), ids).logits, make()(ids).logits)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(make, ids, what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(make(), ids)


def test_prefix_tuning_is_refused_by_name(make, ids):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(make(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for call in (model, lambda input_ids: model.generate(input_ids=input_ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match="no prefix tuning"):
            call(input_ids=ids)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_an_attention_implementation_may_be_named(make, ids, how, tmp_path):
    """Both mean what we have."""
    make().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=how).eval()
    assert_close(loaded(ids).logits, make()(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embeddings_are_got_and_set(make, ids, tied):
    model = make(tie_embeddings=tied)
    assert model.get_output_embeddings() is model.model.head
    twice = torch.nn.Embedding(80, 16)
    model.set_input_embeddings(twice)
    assert model.get_input_embeddings() is twice is model.model.embedding
    model.set_output_embeddings(torch.nn.Linear(16, 80, bias=False))
    assert model(ids + 10).logits.shape == (2, 21, 80)


def test_blocks_are_never_split_over_devices(make):
    accelerate = pytest.importorskip("accelerate")
    model = make(n_layers=3)
    sizes = {0: 30_000, 1: 30_000, "cpu": 10**9}
    places = accelerate.infer_auto_device_map(model, sizes, no_split_module_classes=model._no_split_modules)
    for layer in range(3):
        inside = {place for name, place in places.items() if f"model.blocks.{layer}".startswith(name) or
                  name.startswith(f"model.blocks.{layer}")}  # fmt: skip
        assert len(inside) == 1
    assert len(set(places.values())) > 1


def test_padding_is_guessed_from_ids_only_where_no_token_ends_texts_by_the_same_id(make, ids):
    """transformers' rule, docs/huggingface.md tells of it: with a mask there is nothing to guess."""
    model, padded = make(), ids.clone()
    padded[:, :5] = 0
    alone = model.generate(ids[:, 5:], **GREEDY)[:, 16:]
    read = model.generate(padded, attention_mask=torch.ones_like(ids), **GREEDY)[:, 21:]
    assert not torch.equal(alone, read)
    guessed = model.generate(padded, pad_token_id=0, **GREEDY)[:, 21:]
    both = model.generate(padded, pad_token_id=0, eos_token_id=0, **GREEDY)[:, 21:]
    assert torch.equal(guessed, alone) and torch.equal(both, read)


def test_it_may_be_saved_in_parts(make, ids, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = TitansForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(again(ids).logits, model(ids).logits)
    assert again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_fire_on_all_that_computes(make, ids, variant):
    """Not on what only holds parameters for a layer around it: persistent tokens, and MAC's attention, whose parts MAC
    itself calls."""
    model, fired = make(variant=variant), set()
    computing = {
        "Block",
        "NeuralMemory",
        "Linear",
        "RMSNorm",
        "Embedding",
        "TitansForCausalLM",
        type(model.model).__name__,
    }
    named = {name: module for name, module in model.named_modules() if type(module).__name__ in computing}
    for name, module in named.items():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    model(ids)
    assert fired == set(named)


def test_a_call_is_exported_without_its_cache(make, ids):
    model = make(variant="LMM", n_layers=1)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
        assert_close(exported(ids, use_cache=False).logits, model(ids).logits)
