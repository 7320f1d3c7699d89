"""Two processes train what one trains: the batch is the run's, not a process's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import metrics
from titans.cli import main
from titans.training.config import ConfigError
from titans.training.run import trainer_arguments

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.slow  # starting three processes takes longer than what they do
@pytest.mark.parametrize("carried", [(), ("training.carry_state=true", "training.carry_turns=2")])
def test_two_processes_give_the_losses_of_one(make_config, tmp_path, carried):
    overrides = ("training.steps=4", "training.eval_every=4", "training.device=auto", *carried)
    for name in ("one", "two"):
        make_config(name, *overrides).to_yaml(tmp_path / f"{name}.yaml")
    assert main(["train", "--config", str(tmp_path / "one.yaml")]) == 0
    launch = "torch.distributed.run --nproc_per_node 2 --standalone -m titans.cli train --config two.yaml"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launch.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4: loss") == 1, "one of the processes speaks"
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "eval_bpb"} & set(one):
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)


def test_a_batch_that_cannot_be_shared_out_is_named(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="batch_size: must be a multiple of the 2 processes, got 3"):
        trainer_arguments(make_config("run", "training.batch_size=3").training)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_half_a_launch_is_one_line(make_config, tmp_path, name):
    make_config().to_yaml(tmp_path / "run.yaml")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", name: "2"}
    command = [sys.executable, "-m", "titans.cli", "train", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("titans: training: cannot start here: "), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
