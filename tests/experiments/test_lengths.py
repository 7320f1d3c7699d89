"""What is asked and read at growing lengths: babilong and scaling-analysis."""

import json
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread

from experiments import EXPERIMENTS, babilong, scaling_analysis
from experiments.framework import SCALES, plan, run
from experiments.framework.scales import lengths_up_to, parameters
from titans import TitansConfig, build_model
from titans.cli import main

REAL_SCALES = dict(SCALES)
BABILONG, SCALING = EXPERIMENTS["babilong"], EXPERIMENTS["scaling-analysis"]
SMOKE = {"length": 160, "samples": 2, "training": {"steps": 2, "batch_size": 2}}


@pytest.fixture
def short(monkeypatch):
    """Questions about the shortest texts that hold them."""
    monkeypatch.setitem(babilong.SIZES, "tiny", SMOKE)


def test_lengths_grow_up_to_the_last():
    assert lengths_up_to(256, 4096, 4) == (256, 1024, 4096)
    assert lengths_up_to(256, 5000, 4) == (256, 1024, 4096, 5000)
    assert lengths_up_to(256, 256, 2) == (256,)
    with pytest.raises(ValueError, match="--max-context: must be at least 256, the length of training, got 255"):
        lengths_up_to(256, 255, 2)


@pytest.mark.parametrize("scale", SCALES)
def test_arms_are_of_equal_size(scale, monkeypatch):
    monkeypatch.setitem(SCALES, "tiny", REAL_SCALES["tiny"])
    arms = BABILONG.arms(scale, max_context=10_000)
    sizes = [parameters(arm.run.model) for arm in arms.values()]
    assert [*arms] == ["mag", "window", "transformer"]
    assert scale in ("medium", "large") or max(sizes) <= 1.03 * min(sizes)
    for arm in arms.values():
        assert arm.run.data.tasks == {"babilong_qa1": 1} and arm.lengths[0] == arm.run.data.length
        assert arm.lengths[-1] == 10_000 and arm.tasks == ("babilong_qa1",)
    recalled = SCALING.arms(scale)
    sizes = [parameters(task.model) for task in recalled.values()]
    assert [*recalled] == ["mag", "lmm", "window", "transformer"] and max(sizes) <= 1.03 * min(sizes)
    assert all(task.lengths[0] == task.length for task in recalled.values())


def test_babilong_trains_asks_and_goes_on(short, corpus, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["experiment", "babilong", "--data", str(corpus), "--max-context", "320", "--output", str(output)]
    assert main(words) == 0
    results = json.loads((output / "results.json").read_text())
    assert "--max-context 320" in results["command"] and [*results["arms"]] == [*babilong.ARMS]
    for arm in results["arms"].values():
        assert set(arm) == {"qa1@160", "qa1@320", "state", "parameters"}
    record = json.loads((output / "units" / "transformer-seed0.json").read_text())
    assert [cell["length"] for cell in record["raw"]["cells"]] == [160, 320] and len(record["raw"]["losses"]) == 2
    assert results["arms"]["mag"]["state"]["median"] > results["arms"]["window"]["state"]["median"] > 0
    assert imread(output / "figure.png").shape[1] > 400
    # What was answered is kept: a unit that was lost is written again from it.
    (output / "units" / "mag-seed0.json").unlink()
    cell = output / "runs" / "mag-seed0" / "answers" / "cells" / "babilong_qa1-160.json"
    kept = json.loads(cell.read_text())
    kept["records"][0]["score"] = kept["records"][1]["score"] = 0.25
    cell.write_text(json.dumps(kept))
    capsys.readouterr()
    assert main(words) == 0
    assert "finished before, kept" in capsys.readouterr().err
    again = json.loads((output / "results.json").read_text())
    assert again["arms"]["mag"]["qa1@160"]["median"] == 0.25


def test_a_finished_model_is_asked_about_all_worlds(short, corpus, console, tmp_path):
    config = TitansConfig(vocab_size=256, d_model=16, n_layers=1, chunk_size=8, n_persistent=2)
    build_model(config).save_pretrained(tmp_path / "mine")
    inputs = {"model": tmp_path / "mine", "data": corpus, "max_context": 320}
    work = plan(BABILONG, "tiny", [0], tmp_path / "out", inputs)
    (asked,) = (unit.settings for unit in work.units)
    assert work.units[0].arm == "mine" and asked.run is None and len(asked.weights) == 64
    figures = run(work, console).summary["mine"]
    assert {f"qa{i}@320" for i in range(1, 6)} <= set(figures)
    assert figures["parameters"].median == parameters(config)
    with pytest.raises(ValueError, match="--max-context: must be at least 160"):
        plan(BABILONG, "tiny", [0], tmp_path / "new", {**inputs, "max_context": 100})
    with pytest.raises(ValueError, match="--max-context: eval-perplexity takes none"):
        plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path / "new", {"max_context": 100})


def test_scaling_analysis_measures_in_a_process_of_its_own(console, tmp_path):
    def mag(*given, **inputs):
        return {"mag": SCALING.arms(*given, **inputs)["mag"]}

    report = run(plan(replace(SCALING, arms=mag), "tiny", [0], tmp_path, {"max_context": 64}), console)
    figures = {name: spread.median for name, spread in report.summary["mag"].items()}
    kinds = ("accuracy", "ms", "memory", "state")
    assert set(figures) == {f"{kind}@{length}" for kind in kinds for length in (16, 64)} | {"parameters"}
    assert figures["state@16"] == figures["state@64"] and figures["ms@64"] > 0
    assert 50 < figures["memory@16"] <= figures["memory@64"]
    assert len(report.records[0]["raw"]["mqar"]["losses"]) == 2


def test_a_transformer_keeps_what_it_reads(tmp_path):
    config = SCALING.arms("tiny")["transformer"].model
    build_model(config).save_pretrained(tmp_path)
    costs = scaling_analysis.read_costs(tmp_path, (16, 64), torch.get_num_threads())
    keys_and_values = 2 * config.d_model * config.n_layers * 4 / 1e3
    assert costs[1]["state"] - costs[0]["state"] == pytest.approx(48 * keys_and_values)
