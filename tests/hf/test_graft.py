"""A memory beside layers of a pretrained decoder: nothing changes at first, and its state goes where the cache goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import titans
from decoders import FAMILIES, families, opened, pretrained
from helpers import assert_close
from titans.hf import graft, grafts, load_graft, memories, save_graft
from titans.miras import MirasConfig


@families
def test_it_starts_as_the_pretrained_model(family, ids, mask):
    model, before = graft(pretrained(family), [0, 2], chunk_size=4), pretrained(family)
    assert (model(ids).logits - before(ids).logits).abs().max() < 1e-6
    assert (opened(family)(ids).logits - before(ids).logits).abs().max() > 0.05
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".titans_memory." in name for name in trained)
    assert trained < set(model.state_dict()) and set(before.state_dict()) < set(model.state_dict())
    beams = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **beams), before.generate(ids, **beams))


@families
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_with_the_cache_is_generation_without(family, ids, mask, beams):
    model = opened(family)
    given = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "num_beams": beams}
    both = model.generate(ids, **given)
    assert torch.equal(both, model.generate(ids, use_cache=False, **given))
    alone = model.generate(ids[:1, 6:], **{**given, "attention_mask": mask[:1, 6:]})
    assert torch.equal(both[0, 21:], alone[0, 15:])


@families
def test_a_hundred_steps_on_the_memory_alone_lower_the_loss(family, ids):
    model = graft(pretrained(family), [1], chunk_size=4).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(grafts(model).parameters(), 1e-2)
    losses = []
    for _ in range(100):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())


@families
def test_recomputing_layers_changes_no_gradient(family, ids, mask):
    gradients = []
    for recompute in (False, True):
        model = opened(family, freeze=False).train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
        gradients.append(grafts(model)["2"].gate.grad)
    assert gradients[0].abs().sum() > 0
    assert_close(*gradients)


@families
def test_the_memories_alone_are_saved_and_put_back(family, ids, tmp_path):
    model = opened(family, miras=MirasConfig.titans(), mem_heads=2)
    save_graft(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["titans_graft.safetensors"]
    assert torch.equal(load_graft(pretrained(family), tmp_path)(ids).logits, model(ids).logits)
    file = tmp_path / "titans_graft.safetensors"
    with safe_open(file, "pt") as whole:
        tensors, told = {name: whole.get_tensor(name) for name in whole.keys()}, whole.metadata()  # noqa: SIM118
    del tensors["2.gate"]
    save_file(tensors, file, told)
    with pytest.raises(ValueError, match=r"titans_graft\.safetensors is damaged: its content is not what was saved"):
        load_graft(pretrained(family), tmp_path)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"titans_graft\.safetensors was not written by save_graft"):
        load_graft(pretrained(family), tmp_path)
    file.write_bytes(b"\x80\x04pickle.")
    with pytest.raises(ValueError, match=r"titans_graft\.safetensors is damaged or no safetensors file"):
        load_graft(pretrained(family), tmp_path)


def test_whole_folders_open_in_a_new_process(ids, tmp_path):
    """With the folder's own file; without it no process takes them for the decoders alone."""
    for family in FAMILIES:
        model = opened(family)
        model.save_pretrained(tmp_path / family)
        expected = model(ids).logits, model.generate(ids, max_new_tokens=4, num_beams=2)
        torch.save((ids, *expected), tmp_path / f"{family}.pt")
    script = f"""
import torch
from transformers import AutoModelForCausalLM
for family in {list(FAMILIES)}:
    if family == {next(iter(FAMILIES))!r}:
        try:
            AutoModelForCausalLM.from_pretrained(family, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error)
        else:
            raise SystemExit("opened without our code")
    model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True).eval()
    ids, logits, tokens = torch.load(family + ".pt")
    assert torch.allclose(model(ids).logits, logits, atol=1e-6)
    assert torch.equal(model.generate(ids, max_new_tokens=4, num_beams=2), tokens)
    model.save_pretrained("again-" + family)
"""
    source = str(Path(titans.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for family in FAMILIES:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"again-{family}").eval()
        assert_close(again(ids).logits, opened(family)(ids).logits)


def test_a_folder_that_lacks_a_memorys_tensor_is_refused(ids, tmp_path):
    opened("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.titans_memory.gate"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys model\.layers\.2\.titans_memory\.gate"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@families
def test_the_memories_go_on_without_the_keys_and_values(family, ids):
    """What was read before is known from the memories alone; rows of the cache move them too."""
    model, question = opened(family), ids[:, :5]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert [state.memory.read.tolist() for state in memories(cache).values()] == [[21, 21]] * 2
    fresh = DynamicCache(config=model.config)
    memories(fresh).update(memories(cache))
    known = model(question, past_key_values=fresh).logits
    assert (known - model(question).logits).abs().max() > 1e-3
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert memories(cache)[0].rows == 3
    after = model(question[[1, 1, 1]], past_key_values=cache).logits
    assert_close(after[0], model(torch.cat((ids, question), 1)[1:]).logits[0, 21:])
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    cache.reset()
    assert not any(state.memory.read.any() for state in memories(cache).values())


@families
def test_lora_beside_the_memories(family, ids, mask, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    target = "c_attn" if family == "gpt2" else "q_proj"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=[target], modules_to_save=["titans_memory"], init_lora_weights=False
    )
    model = peft.get_peft_model(opened(family), settings)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "lora" in n)
    model.eval()
    tuned = model(input_ids=ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(opened(family), tmp_path).eval()
    assert_close(again(input_ids=ids, attention_mask=mask).logits, tuned)


def test_it_runs_in_bfloat16(ids):
    model = opened("llama").to(torch.bfloat16)
    assert model.generate(ids, max_new_tokens=2).shape == (2, 23)


def test_what_cannot_be_grafted_is_refused(ids):
    with pytest.raises(ValueError, match=r"layers must be among 0\.\.2, each once, got \[1, 3\]"):
        graft(pretrained("llama"), [1, 3])
    with pytest.raises(ValueError, match=r"memories already, beside layers \[0, 2\]"):
        graft(opened("llama"), [1])
    model = pretrained("llama")
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="model_type must be one of llama.* got 'mamba'"):
        graft(model, [0])
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\]"):
        opened("llama")(ids, attention_mask=torch.zeros(2, 1, 21, 21))
