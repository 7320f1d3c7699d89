"""The commands do what they say; whatever is wrong with the input ends in one line and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from titans.cli import main
from titans.models import TitansConfig, build_model, load_model

ROOT = Path(__file__).parents[2]
MODEL = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 8, "n_persistent": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A saved model with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model(TitansConfig(**MODEL)).save_pretrained(folder)
    return folder


@pytest.fixture
def run_file(tmp_path):
    """The YAML of a run of two steps."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 200)
    path = tmp_path / "run.yaml"
    training = {"steps": 2, "batch_size": 1, "eval_every": 2, "eval_tokens": 50, "device": "cpu", "threads": 1}
    sections = {"model": MODEL, "data": {"source": str(text), "length": 16}, "training": training}
    path.write_text(yaml.safe_dump(sections))
    return path


def complaint(capsys, *words: object) -> str:
    """Run a command that must refuse its input; its one line."""
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("titans: ") and shown.err.count("\n") == 1
    return shown.err


def test_train_then_generate(run_file, tmp_path, capsys):
    output = tmp_path / "out #1: a"  # not to be read as YAML
    assert main(["train", "--config", str(run_file), "--output", str(output), "--set", "training.lr=1e-2"]) == 0
    shown = capsys.readouterr().out
    assert "step 2: loss" in shown and "bits per byte" in shown and str(output / "model") in shown
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3
    assert main(["generate", "--model", str(output / "model"), "--prompt", "to be", "--max-new-tokens", "5"]) == 0
    assert 1 <= len(capsys.readouterr().out) <= 6
    assert "already holds a run" in complaint(capsys, "train", "--config", run_file, "--output", output)


def test_generate_streams_what_the_model_generates(model_dir, capsys):
    words = ["generate", "--model", model_dir, "--prompt", "naïve", "--max-new-tokens", 30, "--top-k", 50, "--seed", 3]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    prompt = torch.tensor([list("naïve".encode())])
    generator = torch.Generator().manual_seed(3)
    model = load_model(model_dir)
    ids = model.generate(prompt, 30, temperature=0.8, top_k=50, eos_token_id=0, generator=generator)[
        0, prompt.shape[1] :
    ]
    assert printed == bytes(i for i in ids.tolist() if i).decode(errors="replace") + "\n"
    assert main([*(str(word) for word in words), "--echo"]) == 0
    assert capsys.readouterr().out == "naïve" + printed


def test_generate_starts_from_a_memory_file(model_dir, tmp_path, capsys):
    model = load_model(model_dir)
    model(torch.randint(1, 256, (1, 40))).state.detach().save(tmp_path / "memory")
    words = ["generate", "--model", str(model_dir), "--prompt", "", "--temperature", "0", "--max-new-tokens", "20"]
    assert main([*words, "--memory", str(tmp_path / "memory")]) == 0
    with_memory = capsys.readouterr().out
    assert main(words) == 0
    assert with_memory != capsys.readouterr().out


def test_a_memory_that_does_not_fit_is_refused(model_dir, tmp_path, capsys):
    words = ("generate", "--model", model_dir, "--prompt", "x", "--memory")
    assert "none" in complaint(capsys, *words, tmp_path / "none")
    (tmp_path / "corrupt").write_bytes(b"no memory at all")
    assert "corrupt" in complaint(capsys, *words, tmp_path / "corrupt")
    torch.manual_seed(1)
    other = build_model(TitansConfig(**MODEL))
    other(torch.ones(1, 5, dtype=torch.int64)).state.detach().save(tmp_path / "foreign")
    assert "other weights" in complaint(capsys, *words, tmp_path / "foreign")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "MODEL", "--prompt", "x", "--temperature", "-1"], "got -1"),
        (["--model", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p must lie in (0, 1], got 2"),
        (["--model", "MODEL", "--prompt", "x", "--max-new-tokens", "many"], "integer, got many"),
        (["--model", "MODEL"], "--prompt"),
        (["--model", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["--model", "BROKEN", "--prompt", "x"], "d_modle: unknown key"),
    ],
)
def test_generate_names_what_is_wrong(model_dir, tmp_path, capsys, words, message):
    broken = tmp_path / "broken"
    load_model(model_dir).save_pretrained(broken)
    (broken / "config.json").write_text(json.dumps({"d_modle": 16}))
    places = {"MODEL": str(model_dir), "BROKEN": str(broken)}
    assert message in complaint(capsys, "generate", *(places.get(word, word) for word in words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "FILE", "--set", "model.d_modle=3"], "model.d_modle: unknown key, did you mean 'd_model'?"),
        (["--config", "FILE", "--set", "training.steps=no"], "training.steps: "),
        (["--config", "FILE", "--set", "data.source=/nowhere.txt"], "data.source: '/nowhere.txt'"),
        (["--config", "FILE", "--set", "data.source=.", "--output", "."], ". is what data.source reads"),
        (["--config", "FILE", "--resume"], "holds no complete checkpoint"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--config", "FILE", "--fast"], "--fast"),
        ([], "--config"),
    ],
)
def test_train_names_what_is_wrong_and_writes_nothing(run_file, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert message in complaint(capsys, "train", *(str(run_file) if word == "FILE" else word for word in words))
    assert sorted(tmp_path.rglob("*")) == before


def test_info_shows_the_cost(run_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["info", "--config", str(run_file)]) == 0
    from_run = capsys.readouterr().out
    assert "memory" in from_run and "FLOPs per token" in from_run and "bytes" in from_run
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "max_seq_len": 16}))
    assert main(["info", "--config", str(tmp_path / "model.json")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == from_run.splitlines()[2:]
    assert "unknown key" in complaint(capsys, "info", "--config", run_file, "--set", "model.width=3")


def test_bench_shows_every_figure(run_file, capsys):
    assert main(["bench", "decode", "--config", str(run_file), "--tokens", "20", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("decode of run.yaml: MAC, width 16") and "after 20 tokens, batch 1" in lines[1]
    assert [line.split("  ")[0] for line in lines[2:]] == ["tokens/s", "peak memory", "GFLOP/s", "of the limit", "by"]
    assert "'flight' is not one of" in complaint(capsys, "bench", "flight", "--config", run_file)
    assert "--device: nothing" in complaint(capsys, "bench", "model", "--config", run_file, "--device", "nothing")
    assert "--device: meta holds no numbers" in complaint(
        capsys, "bench", "model", "--config", run_file, "--device", "meta"
    )
    words = ("bench", "memory", "--config", run_file, "--set", "model.variant=swa")
    assert "variant 'swa' has no memory" in complaint(capsys, *words)


def test_info_of_a_folder_knows_its_fields(model_dir, capsys):
    assert main(["info", "--config", str(model_dir), "--set", "n_layers=3"]) == 0
    assert "3 layers" in capsys.readouterr().out
    for name in ("nlayers", "digest.x"):
        assert "unknown key" in complaint(capsys, "info", "--config", str(model_dir), "--set", f"{name}=3")


def test_info_waits_for_no_pipe_in_a_folder(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    assert "config.json: is not a file" in complaint(capsys, "info", "--config", str(tmp_path))


def test_a_missing_extra_is_named(run_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "titans.training.run", raising=False)
    monkeypatch.delitem(sys.modules, "titans.training.callbacks", raising=False)
    assert "needs transformers: pip install 'titans-miras[train]'" in complaint(capsys, "train", "--config", run_file)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert "needs typer: pip install 'titans-miras[train]'" in complaint(capsys, "info")


def test_no_command_and_an_unknown_one(capsys):
    assert "Missing command" in complaint(capsys)
    assert "No such command 'fly'" in complaint(capsys, "fly")
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out


def test_the_script_is_the_same_command(tmp_path):
    words = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "src")}, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"titans: {tmp_path / 'none.yaml'}: No such file or directory\n"
