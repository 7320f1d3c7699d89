"""The GPU's script where there is none: the same steps, eagerly."""

import json

import pytest
import torch

from experiments import on_gpu
from titans import load_model

SMALL = ("--set", "d_model=16", "--set", "n_layers=1", "--set", "mem_head_dim=8")


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["on_gpu", *map(str, words)])
    on_gpu.main()


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")


def test_needles_trains_saves_and_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "TASKS", {"babilong_qa1": 1})
    words = ("--seconds", 0.5, "--output", tmp_path, "--name", "a", "--tokens", 600, "--samples", 2, "--text", "stdlib")
    words += ("--measured", 512, "--workers", 0, "--lengths", "300,512", "--shares", "0.5,0.5", *SMALL)
    run(monkeypatch, "needles", *words, "--write-cost", 0.1)
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["steps"] >= 1 and set(told["right"]) == {"babilong_qa1 512"} and told["device"] == "cpu"
    assert load_model(tmp_path / "a-model").config.mem_head_dim == 8 and (tmp_path / "a.tar").is_file()


def test_a_price_on_writing_is_paid_by_the_gates(monkeypatch):
    torch.manual_seed(0)
    found = []
    for price in (0.0, 10.0):
        model = on_gpu.build_model(on_gpu.TitansConfig(variant="LMM", vocab_size=256, d_model=16, n_layers=1))
        steps = on_gpu.Steps(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.tensor(price))
        gates = next(m for m in model.modules() if isinstance(m, on_gpu.MemoryGates))
        ids = torch.randint(256, (2, 20))
        before = gates.up.bias.detach().clone()
        for _ in range(2):
            steps(ids, ids)
        found.append((gates.up.bias.detach() - before)[0].item())
    assert found[1] < found[0] - 0.03
