"""What the tests of training runs share: reading their files, and stepping in between two steps."""

import io
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback


def metrics(folder: str | Path) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: str | Path) -> list[tuple]:
    """Everything in the metrics that must not depend on the machine's speed."""
    return [tuple(sorted((k, v) for k, v in line.items() if k != "tokens_per_s")) for line in metrics(folder)]


def quiet() -> Console:
    return Console(file=io.StringIO())


class AtStep(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def poison_weight(model):
    model.model.get_parameter(first_matrix(model)).data[0, 0] = float("nan")


def first_matrix(model) -> str:
    return next(name for name, p in model.model.named_parameters() if p.ndim == 2)


def poison_gradient(model):
    dict(model.model.named_parameters())[first_matrix(model)].register_hook(lambda grad: grad * float("inf"))


def poison_activation(model):
    next(iter(m for m in model.modules() if isinstance(m, torch.nn.RMSNorm))).register_forward_hook(
        lambda module, args, output: output * float("nan")
    )
