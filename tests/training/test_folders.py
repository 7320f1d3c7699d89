"""One folder format: what a run writes, every reader opens, with equal logits and the same tokenizer."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import titans
from helpers import assert_close
from runs import quiet
from titans.cli import main
from titans.data import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from titans.hf import TitansForCausalLM
from titans.models import TitansConfig, build_model, load_model
from titans.models.semantics import SEMANTICS
from titans.training import checkpoints
from titans.training.config import ConfigError
from titans.training.data import load_saved_tokenizer, save_tokenizer
from titans.training.run import train

TEXT = "def \u00fc\u20ac \U0001f600 \u0100\x00\n  </s> end"
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def folders(whole, tmp_path_factory):
    """The same weights as every writer leaves them."""
    place = tmp_path_factory.mktemp("folders")
    model = load_model(whole / "model")
    model.save_pretrained(place / "core")
    adapter = TitansForCausalLM.from_pretrained(whole / "model")
    adapter.save_pretrained(place / "adapter")
    adapter.save_pretrained(place / "shards", max_shard_size="20KB")
    assert len(list((place / "shards").glob("model-*.safetensors"))) > 1
    written = {name: place / name for name in ("core", "adapter", "shards")}
    return {"model": whole / "model", "checkpoint": whole / "checkpoint-8", **written}


@pytest.mark.parametrize("name", ["model", "checkpoint", "core", "adapter", "shards"])
def test_every_reader_opens_every_folder(folders, name):
    expected = load_model(folders["model"])(IDS).logits
    folder = folders[name]
    found = [
        load_model(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        TitansForCausalLM.from_pretrained(folder),
    ]
    for model in found:
        assert_close(model(IDS).logits, expected)
    told = json.loads((folder / "config.json").read_text())
    assert (told["model_type"], told["architectures"], told["semantics"]) == (
        "titans", ["TitansForCausalLM"], SEMANTICS
    )  # fmt: skip


def test_all_writers_give_the_same_tensors_their_same_names(folders):
    files = [load_file(folders[name] / "model.safetensors") for name in ("model", "checkpoint", "core", "adapter")]
    for tensors in files[1:]:
        assert sorted(tensors) == sorted(files[0])
        assert all(torch.equal(tensors[key], files[0][key]) for key in tensors)


@pytest.mark.parametrize("name", ["core", "checkpoint"])
def test_a_process_that_does_not_know_titans_opens_it_with_trust_remote_code(folders, name, tmp_path):
    """And what it saves in turn leads to the package again, not to a copy of its files."""
    script = f"""
        import sys
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(folders[name])!r}, trust_remote_code=True)
        model.save_pretrained({str(tmp_path / "again")!r})
    """
    source = str(Path(titans.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    lines = "\n".join(line.strip() for line in script.splitlines())
    result = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    again = tmp_path / "again"
    assert not (again / "adapter.py").exists()
    assert json.loads((again / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_titans.TitansHFConfig",
        "AutoModel": "modeling_titans.TitansHFModel",
        "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
    }
    assert_close(load_model(again)(IDS).logits, load_model(folders["model"])(IDS).logits)


def test_the_commands_say_the_same_of_every_folder(folders, corpus, tmp_path, capsys):
    pytest.importorskip("wonderwords")
    said, measured = set(), []
    for name, folder in folders.items():
        words = ["--prompt", "the memory", "--max-new-tokens", "9", "--seed", "1"]
        assert main(["generate", "--model", str(folder), *words]) == 0
        said.add(capsys.readouterr().out)
        words = ["--tasks", "ppl,niah_single_1", "--lengths", "384", "--samples", "2", "--device", "cpu"]
        words += ["--text", str(corpus), "--output", str(tmp_path / name)]
        assert main(["evaluate", "--model", str(folder), *words]) == 0
        capsys.readouterr()
        cells = json.loads((tmp_path / name / "results.json").read_text())["cells"]
        measured.append([{key: value for key, value in cell.items() if "seconds" not in key} for cell in cells])
    assert len(said) == 1 and len(said.pop()) > 1
    assert all(cells == measured[0] for cells in measured) and measured[0][0]["score"] > 0


@pytest.mark.parametrize("door", ["hf", "titans"])
def test_lm_eval_answers_the_same_for_every_folder(folders, door, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from titans.evaluation.lm_eval import TitansLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    told = {"device": "cpu", "batch_size": 2}
    kind = TitansLM if door == "titans" else functools.partial(HFLM, trust_remote_code=True)
    tasks = {
        "loglikelihood": [("the", " memory"), ("the", " longer helps")],
        "loglikelihood_rolling": [("the memory reads what surprises it " * 9,)],
        "generate_until": [("the memory", {"until": ["\n"], "max_gen_toks": 6, "do_sample": False})],
    }
    found = []
    for folder in folders.values():
        model = kind(str(folder), **told)
        found.append(
            [getattr(model, n)([Instance(n, {}, given, i) for i, given in enumerate(v)]) for n, v in tasks.items()]
        )
    choices, rolling, written = zip(*found, strict=True)
    assert len({tuple(texts) for texts in written}) == 1 and len({tuple(c[1] for c in cs) for cs in choices}) == 1
    for choice, document in zip(choices, rolling, strict=True):
        assert [c[0] for c in choice] == pytest.approx([c[0] for c in choices[0]], rel=1e-5)
        assert document == pytest.approx(rolling[0], rel=1e-5)


@pytest.mark.parametrize("name", ["model", "checkpoint", "core", "adapter"])
def test_auto_tokenizer_opens_every_folder_of_bytes(folders, name):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    assert tokenizer(TEXT)["input_ids"] == ByteTokenizer().encode(TEXT)
    assert tokenizer.decode(ByteTokenizer().encode(TEXT)) == TEXT
    assert set(tokenizer(TEXT)) == {"input_ids", "attention_mask"}
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 0, 0)
    batch = tokenizer(["abc", "d"], padding=True)
    assert batch["input_ids"][1] == [0, 0, ord("d")] and batch["attention_mask"][1] == [0, 0, 1]
    assert isinstance(load_saved_tokenizer(folders[name]), ByteTokenizer)
    if name in ("model", "checkpoint"):
        assert TitansForCausalLM.from_pretrained(folders[name]).generation_config.eos_token_id in (0, [0])


def test_a_folder_keeps_the_tokenizer_that_lies_in_it(tmp_path):
    """And a model of other than 256 ids gets none: nobody knows what its ids are."""
    save_tokenizer(ByteTokenizer(), tmp_path / "own")
    told = tmp_path / "own" / "tokenizer_config.json"
    told.write_text(told.read_text().replace('"left"', '"right"'))
    fields = {"d_model": 16, "n_layers": 1, "chunk_size": 8}
    build_model(TitansConfig(vocab_size=256, **fields)).save_pretrained(tmp_path / "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "own").padding_side == "right"
    (tmp_path / "older" / "tokenizer").mkdir(parents=True)
    build_model(TitansConfig(vocab_size=256, **fields)).save_pretrained(tmp_path / "older")
    assert [path.name for path in (tmp_path / "older").glob("tokenizer*")] == ["tokenizer"]
    build_model(TitansConfig(vocab_size=300, **fields)).save_pretrained(tmp_path / "other")
    assert not list((tmp_path / "other").glob("tokenizer*"))


def test_auto_tokenizer_opens_what_a_run_of_pieces_leaves(tmp_path):
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the memory reads what surprises it"] * 9, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    given = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    save_tokenizer(given, tmp_path / "model")
    own, auto = load_saved_tokenizer(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert own.separator_id == given.separator_id == auto.eos_token_id == 0
    assert own.encode(TEXT) == given.encode(TEXT) == auto(TEXT)["input_ids"]
    assert 0 not in own.encode(TEXT)  # what spells the separator is none


def test_older_folders_still_open(tmp_path, whole):
    """Tensors without a prefix, no word for transformers in config.json, the tokenizer in a folder of its own."""
    model, old = load_model(whole / "model"), tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(model.config.to_dict()))
    tensors = {name: p.detach().clone() for name, p in model.state_dict().items() if name != "head.weight"}
    save_file(tensors, old / "model.safetensors", {"format": "pt", "semantics": SEMANTICS})
    assert torch.equal(load_model(old)(IDS).logits, model(IDS).logits)
    assert isinstance(load_saved_tokenizer(old), ByteTokenizer)
    nested = {"model_type": "titans", "titans": model.config.to_dict(), "semantics": SEMANTICS, "vocab_size": 1}
    (old / "config.json").write_text(json.dumps(nested))
    assert torch.equal(load_model(old)(IDS).logits, model(IDS).logits)
    save_file(tensors, old / "model.safetensors", {"format": "pt", "semantics": "2"})
    (old / "config.json").write_text(json.dumps(model.config.to_dict()))
    with pytest.raises(ValueError, match="made for semantics 2"):
        load_model(old)


def test_a_folder_of_another_model_is_refused(tmp_path):
    build_model(TitansConfig(vocab_size=9, d_model=8, n_layers=1, chunk_size=4)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type must be 'titans' or 'titans_graft', got 'llama'"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_a_tensor_is_not_resumed(make_config):
    config = make_config("run", "training.steps=3")
    train(config, console=quiet())
    folder = Path(config.training.output_dir)
    shutil.rmtree(folder / "model")
    file = folder / "checkpoint-3" / "model.safetensors"
    tensors = load_file(file)
    gone = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != gone}, file, {"format": "pt"})
    stamp = checkpoints.read_manifest(file.parent, 3)["stamp"]
    checkpoints.finish(file.parent, 3, checkpoints.Stamp(**stamp), keep=2)
    with pytest.raises(ConfigError, match=f"does not fit its config.json.*{gone.removeprefix('model.')}"):
        train(config, resume=True, console=quiet())


def test_a_tokenizer_folder_of_bytes_is_one_for_load_tokenizer_too(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    assert load_tokenizer(tmp_path).encode("a\u0100") == ByteTokenizer().encode("a\u0100")


@pytest.mark.parametrize("content", ["", "[]", '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'])
def test_another_tokenizer_in_the_place_of_bytes_is_not_passed_over(tmp_path, content):
    """transformers would read the one file, and we, by the other one, bytes."""
    build_model(TitansConfig(vocab_size=256, d_model=16, n_layers=1, chunk_size=8)).save_pretrained(tmp_path)
    assert isinstance(load_saved_tokenizer(tmp_path), ByteTokenizer)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not that of bytes"):
        load_saved_tokenizer(tmp_path)
