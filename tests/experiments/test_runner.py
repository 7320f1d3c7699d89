"""Finished units are kept, foreign ones refused, a broken unit goes on; the command reports bad input in one line."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from experiments import EXPERIMENTS
from experiments.framework import SCALES, Column, Experiment, Stopped, Workplace, load, plan, run
from experiments.framework import text as text_module
from experiments.framework.machine import made_with
from experiments.framework.picture import draw
from experiments.framework.report import ABSENT
from titans.cli import main
from titans.training import ConfigError

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
    experiment = Experiment("toy", "What is the size?", arms, unit, columns)
    object.__setattr__(experiment, "calls", calls)
    return experiment


def test_finished_units_are_kept(toy, console, tmp_path):
    run(plan(toy, "tiny", [0], tmp_path), console)
    assert toy.calls == [(1, 0), (4, 0)]
    (tmp_path / "units" / "two-seed0.json").unlink()
    report = run(plan(toy, "tiny", [0, 1], tmp_path), console)
    assert toy.calls == [(1, 0), (4, 0), (4, 0), (1, 1), (4, 1)]
    assert "[1/4] one, seed 0: finished before, kept" in console.file.getvalue()
    assert "about 0.0 left" in console.file.getvalue()
    assert [record["seed"] for record in report.records] == [0, 0, 1, 1]
    assert not list(tmp_path.rglob(".*"))


def test_the_table_has_medians_and_ranges(toy, console, tmp_path):
    run(plan(toy, "tiny", [0, 1, 2], tmp_path), console)
    table = (tmp_path / "table.md").read_text()
    assert "|  | curve, x 1 | curve, x 2 | score |" in table
    assert "| one | 25.0% | 150.0% (50.0% to 250.0%) | 1.1 (1.0 to 1.2) |" in table
    assert "| two | 25.0% | 150.0% (50.0% to 250.0%) | 4.1 (4.0 to 4.2) |" in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["one"]["score"] == {"median": 1.1, "low": 1.0, "high": 1.2}
    assert results["units"][5]["settings"] == {"size": 4} and results["units"][5]["seconds"] >= 0


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {},
        lambda r: [r],
        lambda r: 5,
        lambda r: {**r, "arm": None},
        lambda r: {n: v for n, v in r.items() if n != "seconds"},
        lambda r: {n: v for n, v in r.items() if n != "arm"},
        lambda r: {n: v for n, v in r.items() if n != "figures"},
        lambda r: {**r, "figures": [1]},
        lambda r: {**r, "figures": {"score": "high"}},
        lambda r: {**r, "figures": {"nonsense": 1.0}},
        lambda r: {**r, "seconds": "long"},
        lambda r: {**r, "settings": None},
    ],
)
def test_a_file_that_is_no_unit_is_named(toy, console, tmp_path, change):
    run(plan(toy, "tiny", [0], tmp_path), console)
    file = tmp_path / "units" / "two-seed0.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=r"two-seed0\.json (is no unit of an experiment|was made with)"):
        run(plan(toy, "tiny", [0], tmp_path), console)


def test_files_of_somebody_else_are_not_replaced(toy, tmp_path):
    for name in ("results.json", "table.md", "figure.png"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} is there, and is not ours to replace"):
            plan(toy, "tiny", [0], tmp_path)
        (tmp_path / name).unlink()


def test_units_of_other_settings_are_refused(toy, console, tmp_path):
    run(plan(toy, "tiny", [0], tmp_path), console)
    with pytest.raises(
        ValueError, match=r"two-seed0.json was made with settings.size = 4, now it is 5; choose another --output"
    ):
        plan(toy, "small", [0], tmp_path)
    other = Experiment("other", toy.purpose, toy.arms, toy.unit, toy.columns)
    with pytest.raises(ValueError, match=r"made with experiment = 'toy', now it is 'other'; choose another --output"):
        plan(other, "tiny", [7], tmp_path)
    (tmp_path / "units" / "one-seed0.json").write_text("[1")
    with pytest.raises(ValueError, match=r"one-seed0.json is no unit"):
        plan(toy, "tiny", [0], tmp_path)


def test_rows_of_one_folder_are_reported_together(toy, console, tmp_path):
    def arms(scale, row=None, set=()):
        return {row or "all": Size(size=int(set[0].partition("=")[2]))}

    rows = replace(toy, arms=arms, inputs=("row", "set"))
    run(plan(rows, "tiny", [0, 1], tmp_path, {"row": "wide", "set": ("size=5",)}), console)
    work = plan(rows, "tiny", [0], tmp_path, {"row": "narrow", "set": ("size=2",)})
    assert work.command.endswith(f"--output {tmp_path} --row narrow --set size=2")
    report = run(work, console)
    assert list(report.summary) == ["wide", "narrow"] and report.summary["wide"]["score"].high == 5.1
    assert [record["command"] == work.command for record in report.records] == [False, False, True]
    with pytest.raises(ValueError, match=r"narrow-seed0.json was made with settings.size = 2, now it is 3"):
        plan(rows, "tiny", [0], tmp_path, {"row": "narrow", "set": ("size=3",)})
    alone = run(plan(rows, "tiny", [0], tmp_path, {"set": ("size=7",)}), console)
    assert list(alone.summary) == ["all"]


def test_figures_are_in_the_order_of_their_numbers(toy, console, tmp_path, monkeypatch):
    figures = {"curve@1024": 0.1, "score": 1.0, "curve@64-256": 0.2, "curve@0-64": 0.3}
    mixed = replace(toy, unit=lambda settings, seed, place: figures)
    report = run(plan(mixed, "tiny", [0], tmp_path), console)
    assert report.figures == ["curve@0-64", "curve@64-256", "curve@1024", "score"]
    drawn = []
    monkeypatch.setattr("experiments.framework.picture.draw_lines", lambda axes, lines, xs, labels: drawn.append(xs))
    rare = {**figures, "curve@32": 0.4, "score@64": 2.0, "score@2048": 3.0}
    records = [*report.records, {"arm": "late", "seed": 0, "figures": rare}]
    draw(replace(report, records=tuple(records)), tmp_path / "figure.png")
    assert drawn == [["0-64", "32", "64-256", "1024"], ["", "64", "2048"]]


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


def test_a_text_model_of_other_steps_is_refused(corpus, console, tmp_path, monkeypatch):
    """Steps may change when `titans train` is resumed, but a unit with others would be another one."""
    monkeypatch.setattr("experiments.eval_perplexity.TRAINED", ("LMM",))
    run(plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path, {"data": corpus}), console)
    (tmp_path / "units" / "LMM-seed0.json").unlink()
    longer = replace(SCALES["tiny"], training={**SCALES["tiny"].training, "steps": 5})
    monkeypatch.setitem(SCALES, "tiny", longer)
    with pytest.raises(ConfigError, match=r"training.steps: the run in .* has 3, not 5"):
        run(plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path, {"data": corpus}), console)


def test_a_trained_model_is_measured_not_trained_again(corpus, console, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.eval_perplexity.TRAINED", ("LMM",))
    work = plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path / "out", {"data": corpus})
    measured = text_module.bits_by_position
    monkeypatch.setattr("experiments.eval_perplexity.bits_by_position", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(work, console)
    monkeypatch.setattr("experiments.eval_perplexity.bits_by_position", measured)
    before = (tmp_path / "out/runs/LMM-seed0/text/model/model.safetensors").stat().st_mtime_ns
    run(work, console)
    assert (tmp_path / "out/runs/LMM-seed0/text/model/model.safetensors").stat().st_mtime_ns == before


def test_the_command(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    full = EXPERIMENTS["memory-depth"]
    one = replace(full, arms=lambda *a, **k: {"depth-1": full.arms(*a, **k)["depth-1"]})
    monkeypatch.setitem(EXPERIMENTS, full.name, one)
    words = ["experiment", "memory-depth", "--data", str(corpus), "--output", str(tmp_path / "out")]
    assert main([*words, "--seeds", "0,1", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "depth-1" in shown.out and "MQAR, length 32" in shown.out and str(tmp_path / "out") in shown.out
    assert "[2/2] depth-1, seed 1" in shown.err
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
        (["experiments/none.py"], "NAME: no file experiments/none.py"),
        (["EMPTY.py"], "empty.py defines no EXPERIMENT"),
        (["BROKEN.py"], "broken.py cannot be run: SyntaxError"),
        (["ablation", "--scale", "huge"], "got huge"),
        (["ablation", "--set", "model.d_model=8"], "--set: ablation takes none"),
        (["ablation", "--row", "one"], "--row: ablation takes none"),
        (["ablation", "--row", "../one"], "--row: expected letters, digits, -, _ and ., got '../one'"),
        (["ablation", "--seeds", "0 1"], "--seeds: expected numbers with commas between"),
        (["ablation", "--seeds", "1,1"], "--seeds: each seed once, got 1,1"),
        (["ablation", "--threads", "0"], "got 0"),
        (["ablation", "--threads", "100000"], "got 100000"),  # torch would end the process without a word
        (["ablatoin"], "did you mean 'ablation'?"),
        (["ablation", "--data", "/nowhere"], "got /nowhere"),
        (["ablation", "--model", "FOLDER"], "--model: ablation takes none"),
        (["ablation", "--data", "FOLDER"], "holds no .txt, .jsonl, .parquet file"),
        (["eval-perplexity", "--model", "FOLDER"], "has no config.json"),
        (["ablation", "--output", "FILE"], "File exists"),
        (["train-enwik8"], "enwik8 is not here and could not be downloaded"),
    ],
)
def test_the_command_names_what_is_wrong_and_writes_nothing(words, message, no_network, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.py").write_text("EXPERIMENT = 1")
    (tmp_path / "broken.py").write_text("EXPERIMENT = Experiment(")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    places = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file")}
    places |= {f"{name.upper()}.py": str(tmp_path / f"{name}.py") for name in ("empty", "broken")}
    assert main(["experiment", *(places.get(word, word) for word in words)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("titans: ") and shown.err.count("\n") == 1
    assert message in shown.err
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "cache"] == before


def test_a_file_imports_its_neighbours(tmp_path):
    (tmp_path / "what_it_is_called.py").write_text("NAME = 'borrowed'")
    lines = ["from experiments.framework import Experiment", "from what_it_is_called import NAME"]
    (tmp_path / "own.py").write_text("\n".join([*lines, "EXPERIMENT = Experiment(NAME, '', dict, dict, {})"]))
    assert load(tmp_path / "own.py").name == "borrowed"
