"""Recall of vectors: how streams are drawn, that a rule learns them, and the three studies on top."""

import json
from pathlib import Path

import pytest
import torch

from experiments import vector_recall
from experiments.framework import SCALES, load, plan, run
from experiments.vector_recall import VectorMemory, VectorTask, pairs
from helpers import assert_close
from titans.miras import MLP, GradientDescent, Matrix, MirasConfig
from titans.ops.memory import memory_scan

FOLDER = Path(__file__).parents[2] / "experiments"
STUDIES = {name: load(FOLDER / f"{name}.py") for name in ("outliers", "collisions", "shift")}


def draw(**condition):
    return pairs(torch.Generator().manual_seed(0), 4, 64, 8, 16, **condition)


def test_every_question_is_about_a_pair_shown_before_in_the_same_phase():
    streams = draw(shift=16)
    assert streams.candidates.shape == (4, 4, 8, 16)
    for row in range(4):
        for t in range(64):
            phase = t // 16
            value = streams.candidates[row, phase, streams.answers[row, t]]
            seen = streams.values[row, 16 * phase : t + 1]
            match = (seen == value).all(-1)
            assert match.any()
            key = streams.keys[row, 16 * phase + int(match.nonzero()[0])]
            assert_close(streams.queries[row, t], key, "query")


def test_conditions_do_what_they_say():
    clean = draw()
    assert_close(clean.keys.norm(dim=-1), torch.ones(4, 64), "length of keys")
    noisy = draw(outliers=0.5)
    sizes = noisy.values.square().mean(-1).sqrt()
    assert 0.35 < (sizes > 4).float().mean() < 0.65
    keys = draw(similarity=0.9).queries
    assert 0.7 < (keys[:, :, None] * keys[:, None]).sum(-1).mean() < 0.99
    assert (draw(noise=1.0).keys - draw(noise=1.0).queries).norm(dim=-1).mean() > 0.5


def test_a_matrix_memory_with_exact_steps_recalls_everything():
    # The delta rule on orthogonal keys needs a step of 1/2 on ‖M k - v‖²: everything seen is then known.
    rule = MirasConfig(architecture=Matrix(residual_norm=False), retention="weight_decay", algorithm=GradientDescent())
    memory = VectorMemory(rule, 16, chunk_size=1, use_decay=False)
    with torch.no_grad():
        memory.log_theta.fill_(0.5).log_()
    streams = draw()
    basis = torch.eye(16)[:8].expand(4, 1, 8, 16)
    shown = (streams.values.unsqueeze(2) == streams.candidates).all(-1).int().argmax(-1)
    streams = type(streams)(
        basis[:, 0][torch.arange(4)[:, None], shown], streams.values,
        basis[:, 0][torch.arange(4)[:, None], streams.answers], streams.candidates, streams.answers,
    )  # fmt: skip
    assert (memory(streams).argmax(-1) == streams.answers).all()


def test_log_odds_order_the_candidates_by_distance():
    rule = MirasConfig.yaad("learned", MLP(expansion=1))
    memory, streams = VectorMemory(rule, 16, 8), draw(shift=32)
    gates = {n: v.detach().expand(4, 64, 1) for n, v in (
        ("theta", memory.log_theta.exp()), ("alpha", memory.alpha.sigmoid()), ("delta", memory.log_delta.exp())
    )}  # fmt: skip
    q, k, v = (x.unsqueeze(2) for x in (streams.queries, streams.keys, streams.values))
    reads, _ = memory_scan(
        q, k, v, gates["theta"], None, gates["alpha"], delta=gates["delta"], weights=tuple(memory.weights), miras=rule,
        chunk_size=8, norm=(memory.norm[0], memory.norm[1]),
    )  # fmt: skip
    candidates = streams.candidates.repeat_interleave(32, 1)
    distance = (reads - candidates).square().sum(-1)
    odds = memory(streams)
    assert_close(odds - odds[..., :1], (distance[..., :1] - distance) / 4, "log-odds")


@pytest.mark.parametrize("rule", [MirasConfig.titans(MLP(expansion=1)), MirasConfig.steady(MLP(expansion=1))])
def test_a_rule_learns(rule):
    task = VectorTask(
        rule=rule,
        width=16,
        count=4,
        chunk_size=4,
        tokens=32,
        batch=8,
        steps=40,
        trained_on=({},),
        tested_on={"all": {}},
    )
    said = []
    found = vector_recall.accuracy(vector_recall.learn(task, 0, said.append), task, 32, 2)
    assert found.shape == (32,) and found[16:].mean() > 0.5


@pytest.mark.parametrize("name", STUDIES)
def test_study_runs_to_a_picture(name, tmp_path, monkeypatch, console):
    smoke = {"steps": 2, "batch": 2, "width": 8, "count": 4, "network": MLP(expansion=1)}
    monkeypatch.setitem(vector_recall.STUDY, "tiny", smoke)
    experiment = STUDIES[name]
    if name == "shift":
        monkeypatch.setitem(experiment.arms.__globals__, "TRAINED", 64)
        monkeypatch.setitem(experiment.arms.__globals__, "POINTS", (64, 256))
    report = run(plan(experiment, "tiny", [0], tmp_path), console)
    assert not [r for r in report.records if r.get("failure")]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["units"]) == len(experiment.arms("tiny"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", SCALES)
def test_arms_of_every_scale_are_valid(name, scale):
    assert all(isinstance(task, VectorTask) for task in STUDIES[name].arms(scale).values())
