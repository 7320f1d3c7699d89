"""The studies in experiments/: every file that defines an experiment is run through its path, at the smallest size."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import lasting_report, recall_report
from experiments.framework import SCALES, load, plan, run
from experiments.framework.scales import parameters
from experiments.framework.text import bits_by_position
from helpers import assert_close
from titans import TitansConfig, build_model
from titans.cli import main
from titans.evaluation import nats_by_position
from titans.models.cost import measure_cost
from titans.training import ConfigError

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = {
    "cache",
    "collisions",
    "evidence",
    "lasting",
    "memory_architecture",
    "outliers",
    "recall",
    "shift",
    "stability",
}
LIBRARIES = {"vector_recall", "evidence_report", "lasting_report", "on_gpu", "recall_report"}
NAMED = {"babilong", "comparisons", "eval_perplexity", "scaling_analysis"}  # what the command knows by name
REAL_SCALES = dict(SCALES)


def study(name):
    return load(FOLDER / f"{name}.py")


def test_every_file_is_known_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == FILES | LIBRARIES | NAMED | {"__init__"}
    names = [study(name).name for name in FILES]
    assert len(set(names)) == len(FILES)


@pytest.mark.parametrize("scale", ["tiny", "large"])
def test_memory_networks_are_compared_at_equal_size(scale, monkeypatch):
    monkeypatch.setattr("experiments.framework.scales.validation_streams", lambda *a: None)
    monkeypatch.setitem(SCALES, "tiny", REAL_SCALES["tiny"])
    arms = study("memory_architecture").arms(scale).values()
    for sizes in ([parameters(arm.text.model) for arm in arms], [parameters(arm.recall.model) for arm in arms]):
        assert len(sizes) == 4 and max(sizes) <= 1.03 * min(sizes)


def test_a_row_of_lasting_runs_goes_on_and_joins_the_others(corpus, tmp_path, capsys):
    words = ["experiment", str(FOLDER / "lasting.py"), "--data", str(corpus), "--output", str(tmp_path / "out")]
    words += ["--set", "measure.length=64", "--set", "measure.streams=1", "--set", "measure.windows=2"]
    row = [*words, "--row", "mac-c4", "--set", "model.variant=MAC", "--set", "model.chunk_size=4", "--seeds", "1"]
    assert main([*row, "--set", "training.lr=1e-2", "--set", "model.miras.algorithm=muon"]) == 0
    assert main([*words, "--row", "swa", "--set", "model.variant=swa"]) == 0
    record = json.loads((tmp_path / "out" / "units" / "mac-c4-seed1.json").read_text())
    run_settings = record["settings"]["run"]
    assert run_settings["model"]["variant"] == "MAC" and run_settings["model"]["chunk_size"] == 4
    assert run_settings["training"]["lr"] == run_settings["model"]["lr"] == 1e-2
    assert run_settings["model"]["miras"]["algorithm"]["name"] == "muon" and run_settings["model"]["theta_max"]
    assert "--row mac-c4" in record["command"] and len(record["raw"]["losses"]) == 3
    raw = record["raw"]
    assert record["figures"]["reset"] == pytest.approx(raw["beyond_window_reset"] - raw["beyond_window_on"])
    assert raw["beyond_window_off"] != raw["beyond_window_on"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| mac-c4 |" in table and "| swa |" in table
    capsys.readouterr()
    assert main([*words, "--row", "swa", "--set", "model.variant=swa"]) == 0
    assert "finished before, kept" in capsys.readouterr().err
    assert main([*words, "--row", "swa", "--set", "model.variant=MAG"]) == 2
    assert "was made with settings.run.model.variant = 'swa', now it is 'MAG'" in capsys.readouterr().err


def test_the_field_of_evidence_is_fair(monkeypatch):
    """Equal parameters, the same attention, and a window whose keys and values are as many numbers as a memory."""
    monkeypatch.setitem(SCALES, "tiny", REAL_SCALES["tiny"])
    monkeypatch.setattr("experiments.framework.scales.validation_streams", lambda *a: None)
    found = study("evidence").arms("tiny", set=("measure.streams=0", "training.steps=7"))
    sizes = [parameters(row.run.model) for row in found.values()]
    assert {"window", "transformer", "mag", "mac", "mag-matrix"} <= set(found) and max(sizes) <= 1.03 * min(sizes)
    for row in found.values():
        model = row.run.model
        assert model.attention_conv == 4 and model.attention_induction and row.run.training.steps == 7
    state = measure_cost(found["mag"].run.model).state_bytes
    wide = found["window-wide"].run.model
    assert wide.window * 2 * wide.d_model * wide.n_layers * 4 == pytest.approx(state, rel=0.01)


def test_a_row_of_evidence_is_read_in_every_way(corpus, tmp_path):
    words = ["experiment", str(FOLDER / "evidence.py"), "--data", str(corpus), "--output", str(tmp_path / "out")]
    words += ["--set", "measure.times=2", "--set", "measure.streams=1", "--set", "measure.windows=2"]
    assert main([*words, "--row", "mag"]) == 0
    assert main([*words, "--row", "transformer"]) == 0
    record = json.loads((tmp_path / "out" / "units" / "mag-seed0.json").read_text())
    raw, figures = record["raw"], record["figures"]
    assert len(raw["by_position_on"]) == 31
    assert figures["on"] == pytest.approx(sum(raw["by_position_on"][15:]) / 16, abs=1e-4)
    assert figures["reset"] != 0 and figures["off"] != 0
    # Two lengths of 32: what slides has read 16 of its own, what goes on has read them all.
    assert set(raw["long"]) == {"sliding", "continuous"} and figures["long_sliding"] != figures["long_continuous"]
    other = json.loads((tmp_path / "out" / "units" / "transformer-seed0.json").read_text())
    assert set(other["raw"]["long"]) == {"sliding"} and "reset" not in other["figures"]
    with pytest.raises(ConfigError, match="measure.times: must be even, got 3"):
        study("evidence").arms("tiny", data=corpus, set=("measure.times=3",))


def test_lasting_refuses_what_it_cannot_measure(corpus):
    arms = study("lasting").arms
    assert list(arms("tiny", data=corpus, set=("measure.length=64",))) == [
        "swa", "transformer", "LMM", "MAC", "MAG", "MAL",
    ]  # fmt: skip
    shorthand = arms("tiny", data=corpus, row="matrix", set=("measure.length=64", "model.mem_layers=1"))
    assert shorthand["matrix"].run.model.miras.architecture.name == "matrix"
    with pytest.raises(ConfigError, match="measure.length: 65 is no multiple of data.length 32"):
        arms("tiny", data=corpus, set=("measure.length=65",))
    with pytest.raises(ValueError, match="length: 6400 is more than"):
        arms("tiny", data=corpus, set=("measure.length=6400",))
    with pytest.raises(ConfigError, match=r"model.chunk: unknown key, did you mean 'chunk_size'"):
        arms("tiny", data=corpus, set=("model.chunk=8",))
    with pytest.raises(ValueError, match="window"):
        arms("tiny", data=corpus, set=("measure.window=8",))


def test_small_rows_are_of_the_study():
    """The settings that docs/results/raw/lasting was made with, but for the number of steps."""
    model = study("lasting").arms("small", row="mag")["mag"]
    told = json.loads((FOLDER.parent / "docs/results/raw/lasting/mag-whole-600-seed0.json").read_text())["config"]
    for section in ("model", "data"):
        now = model.run.to_dict()[section]
        assert {k: v for k, v in told[section].items() if v is not None and now[k] != v} == {}
    for name in ("batch_size", "lr", "warmup_steps", "min_lr_ratio", "weight_decay", "clip", "precision", "eval_every"):
        assert getattr(model.run.training, name) == told["training"][name]
    assert (model.measure.windows, model.measure.length, model.measure.streams) == (96, 32_768, 7)


def test_reading_on_is_told_apart_from_restarting(tmp_path):
    torch.manual_seed(0)
    model = build_model(TitansConfig(variant="swa", vocab_size=16, d_model=16, n_layers=1, window=4, n_persistent=0))
    reading_on = study("lasting").arms.__globals__["reading_on"]
    ids = torch.randint(16, (2, 64))
    found = reading_on(model, ids, 32)
    through = nats_by_position(model, [ids], segment=64)
    expected = torch.cat((through[:31], through[32:])) / math.log(2)  # all but byte 32
    assert found["continuous_mean"] == pytest.approx(expected.mean().item())
    # Up to the first restart both have read the same, after it they have not.
    assert found["continuous_mean"] != found["restarted_mean"]
    same = reading_on(model, torch.randint(16, (2, 32)), 32)
    assert same["continuous_mean"] == pytest.approx(same["restarted_mean"])


def test_rows_of_recall_say_any_setting(console, tmp_path):
    changes = ("model.variant=MAC", "model.chunk_size=4", "steps=3", "lr=1e-2", "lengths=[16, 32]")
    work = plan(study("recall"), "tiny", [3], tmp_path, {"row": "mac", "set": changes})
    (unit,) = work.units
    assert (unit.settings.model.variant, unit.settings.model.chunk_size, unit.settings.steps) == ("MAC", 4, 3)
    report = run(work, console)
    # All three steps are warm-up: nothing is said of the gradients after it.
    assert [*report.summary["mac"]] == ["accuracy@16", "accuracy@32", "state", "parameters"]
    assert len(report.records[0]["raw"]["losses"]) == 3
    half = study("recall").arms("tiny", set=("model.theta_max=0.01",))
    assert list(half) == ["LMM", "MAC", "MAG", "MAL", "swa"] and half["LMM"].model.theta_max == 0.01


def test_rows_in_zoologys_setting_are_reported(tmp_path, monkeypatch, capsys):
    words = ["experiment", str(FOLDER / "recall.py"), "--output", str(tmp_path / "out"), "--set", "setting=zoology"]
    words += ["--set", "length=16", "--set", "pairs=2"]
    assert main([*words, "--row", "mag-16", "--set", "model.variant=MAG"]) == 0
    assert main([*words, "--row", "transformer-16", "--set", "model.variant=transformer"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["x", "--folder", str(tmp_path / "out" / "units")])
    assert recall_report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| row | tokens | pairs | right |") and len(lines) == 4
    cells = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in lines[2:]}
    state = 2 * 16 * 16 * 4 / 1000  # keys and values of 16 tokens in one layer of width 16
    row = cells["| transformer"]
    assert row[1:3] == ["16", "2"] and row[-1] == "2" and state <= float(row[5]) < 2 * state


def test_a_cache_finds_what_the_window_forgot(corpus, console, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 4, "window": 8, "n_persistent": 0}
    build_model(TitansConfig(variant="swa", **sizes)).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], length=128, lengths=(128,)))
    work = plan(study("cache"), "tiny", [0], tmp_path / "out", {"model": tmp_path / "model", "data": corpus})
    settings, found = work.units[0].settings, run(work, console).summary["model"]
    bits = bits_by_position(settings.model, settings.data, 128, settings.windows)
    # The corpus is one sentence again and again: untrained, the model knows nothing, the text beyond the window all.
    assert found["alone"].median == pytest.approx(bits[8:].mean().item(), rel=1e-4)
    assert found["beyond"].median < -3 and found["inside"].median > found["beyond"].median
    with pytest.raises(ValueError, match="--model: the folder of a byte-level model is needed"):
        plan(study("cache"), "tiny", [0], tmp_path / "new")


def test_a_cache_looks_only_where_it_may():
    mixed = study("cache").arms.__globals__["mixed"]
    text, told = [[*range(10, 30), 1, 2, 3, 1, 2, 3, 1, 2]], torch.full((1, 28, 256), 1 / 256)
    assert mixed(text, told, 24, 1, 0) == pytest.approx(8)
    assert mixed(text, told, 24, 9, 10**9) == pytest.approx(8)  # what repeats lies nearer
    assert mixed(text, told, 24, 1, 8) < 4


def test_every_part_of_stability_has_figures(console, tmp_path, monkeypatch):
    stability = study("stability")
    monkeypatch.setitem(stability.arms.__globals__, "TINY", {"tokens": 4000, "steps": 22})
    monkeypatch.setitem(stability.arms.__globals__, "PRESETS", ("steady",))
    texts = ["what the memory reads it may forget, " * 400]
    monkeypatch.setitem(stability.arms.__globals__, "load_documents", lambda *a: texts)
    report = run(plan(stability, "tiny", [0], tmp_path), console)
    for arm in ("steady", "muon"):
        assert {name.partition("@")[0] for name in report.summary[arm]} == {*stability.columns}
        assert all(math.isfinite(spread.median) for spread in report.summary[arm].values())
    assert len(report.records[0]["raw"]["losses"]) == 22


def test_the_report_prints_the_rows_of_the_study(tmp_path, monkeypatch, capsys):
    raw, picture = FOLDER.parent / "docs/results/raw/lasting", tmp_path / "picture.png"
    words = ["lasting_report.py", "--folder", str(raw), "--only", "mag-whole-600", "swa-600"]

    def shown(*more):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        assert lasting_report.main() == 0
        return capsys.readouterr().out

    table = shown("--seeds", "--picture", str(picture))
    assert picture.stat().st_size > 10_000
    assert "| swa-600 | 1.841 (1.823 to 1.891) | 1.975 (1.961 to 1.989) |" in table
    assert table.index("mag-whole-600") < table.index("swa-600")
    assert "| swa-600, seed 0 | 1.891 | 1.975 |" in shown()
    with pytest.raises(SystemExit):
        shown("--only", "none")
    assert "has no none" in capsys.readouterr().err


def test_bits_are_sorted_into_buckets():
    by_bucket = study("lasting").arms.__globals__["by_bucket"]
    places = torch.arange(1, 200)
    found = by_bucket(places.double(), places)
    assert list(found) == ["0-64", "64-128", "128-256"]
    assert_close(torch.tensor(found["64-128"]), torch.tensor(95.5), "mean of 64 to 127")


def test_the_readme_shows_an_experiment_that_runs(console, tmp_path):
    text = (FOLDER / "README.md").read_text()
    (tmp_path / "own.py").write_text(text.split("```python\n")[1].split("```")[0])
    report = run(plan(load(tmp_path / "own.py"), "tiny", [0], tmp_path / "out"), console)
    assert [*report.summary] == ["steady", "yaad"] and not report.failures
    assert report.command.startswith(f"titans experiment {tmp_path / 'own.py'} --scale tiny")
    for name in FILES | LIBRARIES:
        assert f"`{name}.py`" in text
