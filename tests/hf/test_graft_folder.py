"""A grafted decoder's folder is opened by every reader, and by none as the decoder alone."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from decoders import families, opened
from helpers import assert_close
from titans.cli import main
from titans.data import ByteTokenizer
from titans.evaluation.grafted import GraftedModel
from titans.models import load_model
from titans.training.data import save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of bytes with two memories, its tokenizer beside it."""
    place = tmp_path_factory.mktemp("grafted") / "model"
    model = opened("llama")
    model.resize_token_embeddings(256)
    model.save_pretrained(place)
    save_tokenizer(ByteTokenizer(), place)
    return place


def reloaded(family, tmp_path):
    model = opened(family)
    model.save_pretrained(tmp_path)
    return model, load_model(tmp_path).eval()


@families
def test_it_has_the_call_of_our_own_models(family, ids, mask, tmp_path):
    model, ours = reloaded(family, tmp_path)
    assert isinstance(ours, GraftedModel)
    assert_close(ours(ids).logits, model(ids).logits)
    padded = ours(ids, attention_mask=mask, labels=ids)
    assert_close(padded.logits[0, 6:], model(ids[:1, 6:]).logits[0])
    state = ours(ids[:, :9], attention_mask=mask[:, :9]).state
    assert state.seen == (3, 9) and state.nbytes > 0
    for _ in range(2):  # a state may be gone on from as often as one likes
        after = ours(ids[:, 9:], state=state, logits_to_keep=3)
        assert after.logits.shape[1] == 3 and after.state.seen == (15, 21)
        assert_close(after.logits, padded.logits[:, -3:])
    tokens = {"max_new_tokens": 5, "attention_mask": mask}
    assert torch.equal(ours.generate(ids, temperature=0, **tokens), model.generate(ids, do_sample=False, **tokens))


@families
def test_its_memories_can_be_forgotten_and_left_unwritten(family, ids, tmp_path):
    _, ours = reloaded(family, tmp_path)
    state, unwritten = ours(ids[:, :9]).state, ours(ids[:, :9], store_mask=torch.zeros(2, 9)).state
    shown = [ours(ids[:, 9:], state=s).logits for s in (state, state.forget(), unwritten)]
    assert all((shown[0] - other).abs().max() > 1e-3 for other in shown[1:])
    assert_close(ours(ids[:, 9:], state=state).logits, shown[0])  # which forget() has left as it was
    assert_close(ours(ids, store_mask=torch.arange(21).expand(2, 21) >= 9).logits[:, 9:], shown[2])


def test_what_it_cannot_read_is_refused(ids, tmp_path):
    _, ours = reloaded("llama", tmp_path)
    with pytest.raises(ValueError, match="state must be a GraftedState of 2 rows, got 1"):
        ours(ids, state=ours(ids[:1]).state)
    with pytest.raises(ValueError, match="state must be a GraftedState of 2 rows, got int"):
        ours(ids, state=3)
    with pytest.raises(ValueError, match=r"input_ids must lie in 0\.\.63, got 64"):
        ours(ids + 64 - ids.max())


def test_the_commands_open_it(folder, tmp_path, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "to be", "--max-new-tokens", "8", "--seed", "1"]) == 0
    written = capsys.readouterr().out
    ids = torch.tensor([list(b"to be")])
    expected = load_model(folder).generate(
        ids, 8, temperature=0.8, eos_token_id=0, generator=torch.Generator().manual_seed(1)
    )
    assert written.rstrip("\n") == bytes(i for i in expected[0, 5:].tolist() if i).decode(errors="replace")
    (tmp_path / "text.txt").write_text("the memory reads what surprises it. " * 200)
    words = ["--tasks", "ppl,niah_single_1", "--lengths", "96", "--samples", "2", "--device", "cpu"]
    output = tmp_path / "out"
    words += ["--text", str(tmp_path / "text.txt"), "--output", str(output)]
    assert main(["evaluate", "--model", str(folder), *words]) == 0
    cells = json.loads((output / "results.json").read_text())["cells"]
    assert cells[0]["score"] > 0 and all(cell["state_bytes"] > 0 for cell in cells if "skipped" not in cell)
    capsys.readouterr()
    assert main(["info", "--config", str(folder), "--set", "d_model=3"]) == 2
    assert main(["info", "--config", str(folder)]) == 0
    assert "LlamaForCausalLM with memories beside layers 0, 2" in capsys.readouterr().out


def test_the_auto_classes_and_the_pipeline_open_it(folder, ids):
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert_close(model.eval()(ids).logits, load_model(folder)(ids).logits)
    assert model.config.model_type == "llama" and isinstance(model, LlamaForCausalLM)
    prompt = AutoTokenizer.from_pretrained(folder)("to be", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    found = generator("to be", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert found == generator.tokenizer.decode(tokens[0])


def test_nobody_takes_it_for_the_decoder_alone(folder, tmp_path):
    told = json.loads((folder / "config.json").read_text())
    assert (told["model_type"], told["architectures"]) == ("titans_graft", ["Grafted"])
    told["titans_graft"]["family"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(told))
    for read in (AutoConfig.from_pretrained, load_model):
        with pytest.raises(ValueError, match="model_type must be one of llama.* got 'mamba'"):
            read(tmp_path)
