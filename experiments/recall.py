"""MQAR: does the memory recall pairs, and does it still at 64 times the training length?

``titans experiment experiments/recall.py --scale small --seeds 0,1,2``; one model, with any setting of `RecallTask`:
``--row mac-half --set model.variant=MAC --set model.theta_max=0.0078125 --set steps=500``; in zoology's own setting:
``--row transformer --set setting=zoology --set model.variant=transformer --set model.vocab_size=8192 --set length=256
--set pairs=16`` (docs/results/mqar.md).
"""

import copy

from experiments.framework import SCALES, Column, Experiment, Figures, Workplace
from experiments.framework.recall import RecallTask, score_recall, state_bytes, train_recall
from experiments.framework.scales import parameters
from titans.training.config import set_field

VARIANTS = ("LMM", "MAC", "MAG", "MAL", "swa")


def arms(scale: str, row: str | None = None, set: tuple[str, ...] = ()) -> dict[str, RecallTask]:
    """One row, an LMM unless it says otherwise, or every variant; all with the changes of ``set``."""
    found = {}
    for name in VARIANTS if row is None else (row,):
        raw = copy.deepcopy(SCALES[scale].recall)
        raw.pop("lengths", None)
        raw["model"]["variant"] = name if row is None else "LMM"
        for change in set:
            set_field(raw, change)
        task = RecallTask.model_validate(raw)
        lengths = task.lengths if "lengths" in raw else tuple(task.length * 4**i for i in range(4))
        found[name] = task.model_copy(update={"model": task.model.explicit(), "lengths": lengths})
    return found


def unit(task: RecallTask, seed: int, place: Workplace) -> Figures:
    """Train, then score at every length."""
    model, told = train_recall(task, seed, place.say)
    place.raw.update(told)
    accuracy = {f"accuracy@{length}": score_recall(model, task, length) for length in task.lengths}
    norms = told["gradient_norms"][task.warmup_steps :]
    held = {"state": state_bytes(model, task, task.length), "parameters": parameters(task.model)}
    return {**accuracy, **({"norm": max(norms)} if norms else {}), **held}


EXPERIMENT = Experiment(
    name="recall",
    purpose="Recall of key-value pairs (MQAR) at up to 64 times the length of training.",
    arms=arms,
    unit=unit,
    columns={
        "accuracy": Column("right answers", ".1%", "tokens"),
        "norm": Column("largest gradient norm after warm-up", ".2f", drawn=False),
        "state": Column("bytes of state at the training length", ",.0f", drawn=False),
        "parameters": Column("parameters", ",.0f", drawn=False),
    },
    inputs=("row", "set"),
)
