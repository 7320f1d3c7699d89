"""MQAR: does the memory recall pairs, and does it still at 64 times the training length?

``titans experiment experiments/recall.py --scale small --seeds 0,1,2``; one model, with any setting of `RecallTask`:
``--row mac-half --set model.variant=MAC --set model.theta_max=0.0078125 --set steps=500``.
"""

from titans.experiments import SCALES, Column, Experiment, Figures, Workplace
from titans.experiments.recall import RecallTask, score_recall, train_recall
from titans.experiments.scales import parameters, recall_task
from titans.training.config import set_field

VARIANTS = ("LMM", "MAC", "MAG", "MAL", "swa")


def arms(scale: str, row: str | None = None, set: tuple[str, ...] = ()) -> dict[str, RecallTask]:
    """One row, an LMM unless it says otherwise, or every variant; all with the changes of ``set``."""
    found = {}
    for name in VARIANTS if row is None else (row,):
        raw = recall_task(SCALES[scale], name if row is None else "LMM").model_dump()
        # The cap of θ follows the rule and the chunk, which a change may be about.
        raw["model"]["theta_max"] = None
        raw["lengths"] = [raw["length"] * 4**i for i in range(4)]
        for change in set:
            set_field(raw, change)
        task = RecallTask.model_validate(raw)
        found[name] = task.model_copy(update={"model": task.model.explicit()})
    return found


def unit(task: RecallTask, seed: int, place: Workplace) -> Figures:
    """Train, then score at every length."""
    model, told = train_recall(task, seed, place.say)
    place.raw.update(told)
    accuracy = {f"accuracy@{length}": score_recall(model, task, length) for length in task.lengths}
    norm = max(told["gradient_norms"][task.warmup_steps :], default=0.0)
    return {**accuracy, "norm": norm, "parameters": parameters(task.model)}


EXPERIMENT = Experiment(
    name="recall",
    purpose="Recall of key-value pairs (MQAR) at up to 64 times the length of training.",
    arms=arms,
    unit=unit,
    columns={
        "accuracy": Column("right answers", ".1%", "tokens"),
        "norm": Column("largest gradient norm after warm-up", ".2f", drawn=False),
        "parameters": Column("parameters", ",.0f", drawn=False),
    },
    inputs=("row", "set"),
)
