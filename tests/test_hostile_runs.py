"""Hostile cases of the commands: runs over little text and lost files, and who is blamed for what."""

import shutil

import pytest

from titans import TitansConfig, build_model
from titans.cli import main
from titans.cli.errors import missing_extra
from titans.training.config import TrainConfig


@pytest.fixture
def settings(tmp_path):
    """Function that makes the settings of a run over a text."""

    def make(text):
        (tmp_path / "text.txt").write_text(text)
        training = {"steps": 3, "batch_size": 1, "eval_every": 0, "save_every": 2, "device": "cpu", "threads": 1}
        model = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 8, "n_persistent": 2}
        data = {"source": str(tmp_path / "text.txt"), "length": 16}
        sections = {"model": model, "data": data, "training": {**training, "output_dir": str(tmp_path / "run")}}
        TrainConfig.parse(sections).to_yaml(tmp_path / "run.yaml")
        return tmp_path / "run.yaml"

    return make


def test_a_text_shorter_than_a_window_is_refused_without_an_evaluation_too(settings, capsys):
    for text in ("a", "abc def"):
        assert main(["train", "--config", str(settings(text))]) == 2
        assert "data." in capsys.readouterr().err


def test_metrics_that_are_lost_cost_no_model(settings, tmp_path, capsys):
    words = ["train", "--config", str(settings("to be or not to be, " * 99))]
    assert main(words) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    shown = capsys.readouterr()
    assert "3 steps up to 3 have no readable line" in " ".join(shown.err.split())
    assert shown.out.startswith("step 3; model in ") and (tmp_path / "run" / "model").is_dir()


def test_a_checkpoint_that_is_no_folder_is_refused_first(settings, tmp_path, capsys):
    words = ["train", "--config", str(settings("to be or not to be, " * 99))]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-2").write_text("mine")
    for more in ([], ["--resume"]):
        assert main([*words, *more]) == 2
        assert "checkpoint-2 is not a folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        (["--memory", "PLACE/config.json"], "--memory"),
        (["--memory", "PLACE/model.safetensors"], "--memory"),
        (["--memory", "/nowhere"], "--memory"),
        (["--seed", "9" * 30], "--seed"),
        (["--top-k", "9" * 30], "--top-k"),
        (["--max-new-tokens", "9" * 30], "--max-new-tokens"),
    ],
)
def test_the_blame_is_where_it_belongs(tmp_path, capsys, words, blamed):
    build_model(TitansConfig(vocab_size=256, d_model=16, n_layers=1, chunk_size=8)).save_pretrained(tmp_path)
    words = [word.replace("PLACE", str(tmp_path)) for word in words]
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x", *words]) == 2
    told = capsys.readouterr().err
    assert blamed in told and "--model" not in told and told.count("\n") == 1


def test_what_is_missing_is_said_with_and_without_a_name():
    assert missing_extra(ModuleNotFoundError("no pandas here", name="pandas.core")) == (
        "this command needs pandas: pip install 'titans-miras[train]'"
    )
    assert missing_extra(ModuleNotFoundError("something is missing")) == "something is missing"
    with pytest.raises(ModuleNotFoundError):
        missing_extra(ModuleNotFoundError("our own", name="titans.nothing"))
