"""SIGTERM and SIGHUP end a command in one line, with what is finished kept; a broken display ends nothing."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny import LINE, OF_BYTES, model_and_text
from titans.cli import main
from titans.cli.errors import say
from titans.models import MemoryFile, load_model

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and two texts."""
    folder = model_and_text(tmp_path_factory.mktemp("signals"))
    (folder / "long.txt").write_text(LINE * 99)
    return folder


def signalled(monkeypatch, name, number, call):
    """Let the ``call``-th call of ``name`` be where the signal comes."""
    import pydoc

    module, _, function = name.rpartition(".")
    before, calls = pydoc.locate(name), []

    def wrapped(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return before(*arguments, **named)

    monkeypatch.setattr(pydoc.locate(module), function, wrapped)


COMMANDS = {
    "memorize": (["--input", "PLACE/text.txt", "--output", "OUT/memory"], "titans.reading.memorize.read_piece", 3),
    "trace": (["--input", "PLACE/text.txt", "--output", "OUT/page.html"], "titans.reading.trace_text", 1),
    "evaluate": (
        ["--output", "OUT/eval", "--tasks", "ppl", "--lengths", "32,64", "--text", "PLACE/long.txt"],
        "titans.evaluation.harness._measure",
        2,
    ),
    "generate": (["--prompt", "x"], "titans.cli.generate.write_text", 1),
    "ask": ([], "titans.cli.ask.write_text", 2),
}


@pytest.mark.usefixtures("not_under_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_is_one_line_and_leaves_nothing_half_written(place, tmp_path, capsys, monkeypatch, command, number):
    words, where, call = COMMANDS[command]
    words = [w.replace("PLACE", str(place)).replace("OUT", str(tmp_path)) for w in words]
    monkeypatch.setattr("titans.models.memorize.PIECE", 64)
    monkeypatch.setattr(sys, "stdin", io.StringIO("who?\nwhat?\n"))
    signalled(monkeypatch, where, number, call)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    assert main([command, "--model", str(place / "model"), *words]) == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == before
    told = capsys.readouterr().err.splitlines()[-1]
    if command in ("memorize", "evaluate"):
        assert told.startswith("stopped; ") and "goes on" in told
    else:
        assert told == f"titans: stopped by {signal.Signals(number).name}"
        assert list(tmp_path.iterdir()) == []
    if command == "memorize":
        assert MemoryFile.open(tmp_path / "memory").tokens == 128
        monkeypatch.undo()
        monkeypatch.setattr("titans.models.memorize.PIECE", 64)
        assert main([command, "--model", str(place / "model"), *words, "--resume"]) == 0
        assert MemoryFile.open(tmp_path / "memory").tokens == 397


def test_nothing_read_is_not_called_resumable(place, tmp_path, capsys, monkeypatch):
    signalled(monkeypatch, "titans.reading.memorize.read_piece", signal.SIGTERM, 1)
    words = ["--input", str(place / "text.txt"), "--output", str(tmp_path / "memory")]
    assert main(["memorize", "--model", str(place / "model"), *words]) == 143
    assert "nothing was read yet" in capsys.readouterr().err and not (tmp_path / "memory").exists()


def test_another_processs_memory_is_not_called_what_was_read(place, tmp_path, capsys, monkeypatch):
    model, output = load_model(place / "model"), tmp_path / "memory"

    def meanwhile(*arguments):
        model.memorize("short").save(output)
        raise KeyboardInterrupt

    monkeypatch.setattr("titans.reading.memorize.read_piece", meanwhile)
    words = ["--input", str(place / "text.txt"), "--output", str(output)]
    assert main(["memorize", "--model", str(place / "model"), *words]) == 130
    assert "nothing was read yet" in capsys.readouterr().err and MemoryFile.open(output).tokens == 5


def test_train_that_is_ended_before_its_first_step_says_so(tmp_path, capsys, monkeypatch):
    from titans.training.config import TrainConfig

    (tmp_path / "text.txt").write_text("the quick brown fox " * 300)
    training = {"steps": 2, "batch_size": 1, "eval_every": 0, "device": "cpu", "output_dir": str(tmp_path / "run")}
    data = {"source": str(tmp_path / "text.txt"), "length": 16}
    TrainConfig.parse({"model": OF_BYTES, "data": data, "training": training}).to_yaml(tmp_path / "run.yaml")
    signalled(monkeypatch, "titans.training.run.load_data", signal.SIGTERM, 1)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 143
    assert capsys.readouterr().err == "titans: stopped by SIGTERM\n" and not (tmp_path / "run").exists()


def test_a_signal_from_outside_ends_a_reading_of_standard_input(place, tmp_path):
    words = ["memorize", "--model", str(place / "model"), "--input", "-", "--output", str(tmp_path / "memory")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-m", "titans.cli", *words], env=environment, **pipes)
    assert process.stdin is not None
    process.stdin.write(b"the quick brown fox " * 4_000)  # more than a pipe holds: it is being read when this returns
    process.stdin.flush()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    shown, told = process.communicate(timeout=60)
    assert (process.returncode, shown) == (143, b"") and told.splitlines()[-1].startswith(b"stopped; ")


class Failing(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("not_under_nohup")
def test_a_display_that_breaks_ends_no_command(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Failing())
    say("a word")
    output = ["--output", str(tmp_path / "eval"), "--tasks", "ppl", "--lengths", "32", "--text"]
    assert main(["evaluate", "--model", str(place / "model"), *output, str(place / "long.txt")]) == 0
    signalled(monkeypatch, "titans.evaluation.harness._measure", signal.SIGHUP, 1)
    assert main(["evaluate", "--model", str(place / "model"), *output, str(place / "long.txt")]) == 129
    assert (tmp_path / "eval" / "results.json").is_file()


def test_a_file_that_ends_too_early_is_no_interruption(place, capsys, monkeypatch):
    def early(*arguments):
        raise EOFError("Ran out of input")

    monkeypatch.setattr("titans.models.load_model", early)
    assert main(["generate", "--model", str(place / "model"), "--prompt", "x"]) == 1
    assert "titans: a file ended too early: Ran out of input" in capsys.readouterr().err
