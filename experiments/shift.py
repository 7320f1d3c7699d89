"""What lasts on a long stream whose content changes? All pairs are replaced by new ones every 64 tokens.

Trained on 256 tokens, read to 16,384: a memory must make room for the new without falling apart (Titans §3.1 on
forgetting, MIRAS §5.2 on Memora).
"""

from experiments.framework import Column, Experiment, Figures, Workplace
from experiments.vector_recall import STUDY, VectorTask, accuracy, learn
from titans.miras import MirasConfig
from titans.miras.config import PRESETS

SHIFT, TRAINED, POINTS = 64, 256, (256, 1024, 4096, 16_384)


def arms(scale: str) -> dict[str, VectorTask]:
    """The presets, and the Titans rule and Memora without their forgetting gates."""
    condition = {"shift": SHIFT}
    size = {**STUDY[scale], "tokens": TRAINED, "trained_on": (condition,), "tested_on": {"stream": condition}}
    network = size.pop("network")
    rules = {name: getattr(MirasConfig, name)(architecture=network) for name in PRESETS}
    found = {name: VectorTask(rule=rule, **size) for name, rule in rules.items()}
    for name in ("titans", "memora"):
        found[f"{name}-no-forgetting"] = VectorTask(rule=rules[name], use_decay=False, **size)
    return found


def unit(task: VectorTask, seed: int, place: Workplace) -> Figures:
    """Accuracy over the last ``TRAINED`` tokens before each of ``POINTS``."""
    memory = learn(task, seed, place.say)
    small = task.model_copy(update={"batch": 8})
    right = accuracy(memory, small, max(POINTS), 2, shift=SHIFT)
    return {f"accuracy@{end}": right[end - TRAINED : end].mean().item() for end in POINTS}


EXPERIMENT = Experiment(
    name="distribution-shift",
    purpose="Recall of vectors on long streams whose pairs change every 64 tokens: what forgets well, and lasts.",
    arms=arms,
    unit=unit,
    columns={"accuracy": Column("right answers", ".1%", "tokens read")},
    note="16 pairs at a time, asked as soon as they are shown; accuracy over the last 256 tokens before each point. "
    "Trained on 256 tokens. Chance is 6 %.",
)
