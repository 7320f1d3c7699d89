"""Finished units are kept, foreign ones refused, a broken unit goes on; the command reports bad input in one line."""

import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from titans.cli import main
from titans.experiments import EXPERIMENTS, Column, Experiment, Stopped, Workplace, plan, run
from titans.experiments import text as text_module
from titans.experiments.report import ABSENT
from titans.experiments.runner import made_with

ROOT = Path(__file__).parents[2]


class Size(BaseModel):
    size: int


@pytest.fixture
def toy():
    """An experiment without any model; ``toy.calls`` lists the units that were computed."""
    calls = []

    def unit(settings: Size, seed: int, place: Workplace):
        calls.append((settings.size, seed))
        if settings.size < 0:
            raise FloatingPointError("step 3: the loss is nan")
        return {"score": settings.size + seed / 10, "curve@1": 0.25, "curve@2": 0.5 + seed}

    def arms(scale):
        return {"one": Size(size=1), "two": Size(size=len(scale))}

    columns = {"curve": Column("curve", ".1%", over="x"), "score": Column("score", ".1f")}
    experiment = Experiment("toy", "What is the size?", arms, unit, columns, beside={"paper": {"one": "27"}})
    object.__setattr__(experiment, "calls", calls)
    return experiment


def test_finished_units_are_kept(toy, console, tmp_path):
    run(plan(toy, "tiny", [0], tmp_path), console)
    assert toy.calls == [(1, 0), (4, 0)]
    (tmp_path / "units" / "two-seed0.json").unlink()
    report = run(plan(toy, "tiny", [0, 1], tmp_path), console)
    assert toy.calls == [(1, 0), (4, 0), (4, 0), (1, 1), (4, 1)]
    assert "[1/4] one, seed 0: finished before, kept" in console.file.getvalue()
    assert "about 0 s left" in console.file.getvalue()
    assert [record["seed"] for record in report.records] == [0, 0, 1, 1]
    assert not list(tmp_path.rglob(".*"))


def test_the_table_has_medians_ranges_and_the_paper(toy, console, tmp_path):
    run(plan(toy, "tiny", [0, 1, 2], tmp_path), console)
    table = (tmp_path / "table.md").read_text()
    assert "|  | curve, x 1 | curve, x 2 | score | paper |" in table
    assert "| one | 25.0% | 150.0% (50.0% to 250.0%) | 1.1 (1.0 to 1.2) | 27 |" in table
    assert f"| two | 25.0% | 150.0% (50.0% to 250.0%) | 4.1 (4.0 to 4.2) | {ABSENT} |" in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["one"]["score"] == {"median": 1.1, "low": 1.0, "high": 1.2}
    assert results["units"][5]["settings"] == {"size": 4} and results["units"][5]["seconds"] >= 0


def test_units_of_other_settings_are_refused(toy, console, tmp_path):
    run(plan(toy, "tiny", [0], tmp_path), console)
    with pytest.raises(
        ValueError, match=r"two-seed0.json was made with size = 4, now it is 5; choose another --output"
    ):
        plan(toy, "small", [0], tmp_path)
    other = Experiment("other", toy.purpose, toy.arms, toy.unit, toy.columns)
    with pytest.raises(ValueError, match=r"belongs to toy; choose another --output"):
        plan(other, "tiny", [7], tmp_path)
    (tmp_path / "units" / "one-seed0.json").write_text("[1")
    with pytest.raises(ValueError, match=r"one-seed0.json is no unit"):
        plan(toy, "tiny", [0], tmp_path)


def test_a_unit_that_diverges_is_a_result(toy, console, tmp_path):
    broken = Experiment(
        "toy", toy.purpose, lambda scale: {"good": Size(size=1), "bad": Size(size=-1)}, toy.unit, toy.columns
    )
    report = run(plan(broken, "tiny", [0], tmp_path), console)
    assert report.failures == ["bad, seed 0: step 3: the loss is nan"]
    table = (tmp_path / "table.md").read_text()
    assert f"| bad | {ABSENT} | {ABSENT} | {ABSENT} |" in table and "- bad, seed 0: step 3" in table
    run(plan(broken, "tiny", [0], tmp_path), console)
    assert toy.calls == [(1, 0), (-1, 0)]


def test_a_figure_that_is_no_number_is_no_figure(toy, console, tmp_path):
    nan = replace(toy, unit=lambda settings, seed, place: {"score": float("nan")})
    assert run(plan(nan, "tiny", [0], tmp_path), console).failures[0] == "one, seed 0: score is nan"


def test_a_record_says_what_it_was_made_with():
    told = made_with()
    assert told["threads"] == 1 and told["torch"]
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert head.startswith(told["commit"].rstrip("+"))


def test_text_training_goes_on_from_its_checkpoint(corpus, console, tmp_path, monkeypatch):
    """A signal in the first unit's second step; the rest is trained by the next run, to the same figures."""
    from titans.training import run as training

    full = EXPERIMENTS["ablation"]
    ablation = replace(
        full, arms=lambda *a, **k: {n: s for n, s in full.arms(*a, **k).items() if n in ("LMM", "sphere")}
    )
    whole = run(plan(ablation, "tiny", [0], tmp_path / "whole", {"data": corpus}), console).summary
    train, steps = training.train, []

    class Kill(training.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "train", lambda *a, **k: train(*a, **k, callbacks=[Kill()]))
    with pytest.raises(Stopped) as stopped:
        run(plan(ablation, "tiny", [0], tmp_path / "out", {"data": corpus}), console)
    assert stopped.value.signal == signal.SIGTERM
    assert not list(tmp_path.glob("out/units/*")) and not (tmp_path / "out" / "results.json").exists()

    def resumed(config, resume, console):
        steps.append(resume)
        return train(config, resume, console)

    monkeypatch.setattr(training, "train", resumed)
    again = run(plan(ablation, "tiny", [0], tmp_path / "out", {"data": corpus}), console).summary
    assert steps == [True, False]
    assert again == whole


def test_a_trained_model_is_measured_not_trained_again(corpus, console, tmp_path, monkeypatch):
    monkeypatch.setattr("titans.experiments.eval_perplexity.TRAINED", ("LMM",))
    work = plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path / "out", {"data": corpus})
    measured = text_module.bits_by_position
    monkeypatch.setattr("titans.experiments.eval_perplexity.bits_by_position", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(work, console)
    monkeypatch.setattr("titans.experiments.eval_perplexity.bits_by_position", measured)
    before = (tmp_path / "out/runs/LMM-seed0/text/model/model.safetensors").stat().st_mtime_ns
    run(work, console)
    assert (tmp_path / "out/runs/LMM-seed0/text/model/model.safetensors").stat().st_mtime_ns == before


def test_the_command(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    full = EXPERIMENTS["memory-architecture"]
    one = replace(full, arms=lambda *a, **k: {"matrix": full.arms(*a, **k)["matrix"]})
    monkeypatch.setitem(EXPERIMENTS, full.name, one)
    words = ["experiment", "memory-architecture", "--data", str(corpus), "--output", str(tmp_path / "out")]
    assert main([*words, "--seeds", "0,1", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "matrix" in shown.out and "MQAR, length 32" in shown.out and str(tmp_path / "out") in shown.out
    assert "[2/2] matrix, seed 1" in shown.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "units", "runs", "results.json", "table.md", "figure.png",
    }  # fmt: skip
    assert len(list((tmp_path / "out" / "units").iterdir())) == 2


def test_they_are_listed(capsys):
    assert main(["experiment", "--list"]) == 0
    listed = capsys.readouterr().out
    assert main(["experiment"]) == 0
    assert capsys.readouterr().out == listed
    assert all(f"{name} " in listed for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["memory-dept"], "'memory-dept' is none of miras-variants, "),
        (["ablation", "--scale", "huge"], "got huge"),
        (["ablation", "--seeds", "0 1"], "--seeds: expected numbers with commas between"),
        (["ablation", "--seeds", "1,1"], "--seeds: each seed once, got 1,1"),
        (["ablation", "--threads", "0"], "got 0"),
        (["ablation", "--data", "/nowhere"], "got /nowhere"),
        (["ablation", "--model", "FOLDER"], "--model: ablation takes none"),
        (["ablation", "--data", "FOLDER"], "holds no .txt, .jsonl, .parquet file"),
        (["eval-perplexity", "--model", "FOLDER"], "has no config.json"),
        (["ablation", "--output", "FILE"], "is a file"),
        (["train-enwik8"], "enwik8 is not here and could not be downloaded"),
    ],
)
def test_the_command_names_what_is_wrong_and_writes_nothing(words, message, no_network, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    places = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file")}
    assert main(["experiment", *(places.get(word, word) for word in words)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("titans: ") and shown.err.count("\n") == 1
    assert message in shown.err
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "cache"] == before


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("scripts/run_experiments.py", ["none-such"]),
        ("experiments/01_miras_variants/run_comparison.py", ["--scale", "none-such"]),
    ],
)
def test_the_scripts_are_the_same_command(script, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 2 and "none-such" in capsys.readouterr().err
