"""SIGKILL at any moment: the run goes on as if nothing had been, a state file is the old one or the new one."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from runs import losses, quiet
from tiny import ids, small
from titans.models import ModelState
from titans.training import checkpoints
from titans.training.run import train

pytestmark = pytest.mark.slow
fork = multiprocessing.get_context("fork")


def killed_after(seconds, work, *arguments):
    """Whether ``work``, in a process of its own, was killed before it ended."""
    process = fork.Process(target=work, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def go_on(config):
    begun = checkpoints.last_checkpoint(config.training.output_dir) is not None
    train(config, resume=begun, console=quiet())


def test_twenty_kills_in_training(make_config):
    overrides = ("training.steps=60", "training.save_every=2", "training.eval_every=20", "training.carry_state=true")
    whole, config = make_config("whole", *overrides), make_config("killed", *overrides)
    started = time.perf_counter()
    train(whole, console=quiet())
    length = time.perf_counter() - started
    draw, kills, rounds = random.Random(0), 0, 0
    folder = Path(config.training.output_dir)
    while kills < 20:
        rounds += 1
        assert rounds < 60
        if killed_after(draw.uniform(0.1, 0.4) * length, go_on, config):
            kills += 1
        if (folder / "model").exists():  # it got through: the curves are those of the run that was never killed
            assert losses(folder) == losses(whole.training.output_dir)
            shutil.rmtree(folder)
    if not (folder / "model").exists():
        go_on(config)
    assert losses(folder) == losses(whole.training.output_dir)
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert names == {p.name for p in Path(whole.training.output_dir).iterdir()}


def write_in_turns(path, states):
    while True:
        for state in states:
            state.save(path)


def test_twenty_kills_in_writing_state_files(tmp_path):
    model, path, draw = small("MAC"), tmp_path / "s.st", random.Random(1)
    states = [model(ids(tokens=tokens)).state.detach() for tokens in (13, 29)]
    for state in states:
        state.save(path)  # the weights' hash is taken once, before the processes part
    for _ in range(20):
        assert killed_after(draw.uniform(0.05, 0.3), write_in_turns, path, states)
        loaded = ModelState.load(path)
        (expected,) = (state for state in states if state.seen == loaded.seen)
        assert torch.equal(model(ids(), state=loaded).logits, model(ids(), state=expected).logits)
