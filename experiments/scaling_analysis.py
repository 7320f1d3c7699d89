"""What does a longer text cost, and what is still known of it? Accuracy, time, memory and state against length.

``titans experiment scaling-analysis --scale tiny --max-context 16384``. A MAG, an LMM and the opponents, of equal size,
are trained on recall (MQAR) at one length. The same pairs are then asked for in longer and longer texts, and each model
reads one stream of every length in a process of its own, whose memory is looked at.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.framework.experiment import Column, Experiment, Figures, Workplace
from experiments.framework.recall import RecallTask, device, score_recall, train_recall
from experiments.framework.scales import SCALES, lengths_up_to, match_parameters, parameters, recall_task
from titans import load_model
from titans.evaluation.reading import read

ARMS = {"mag": "MAG", "lmm": "LMM", "window": "swa", "transformer": "transformer"}
TIMES = 64  # how far beyond training, unless --max-context says so
PIECE = 1024  # tokens of a call: what is needed for a call itself does not grow
ROUNDS = 3


def arms(scale: str, max_context: int | None = None) -> dict[str, RecallTask]:
    """The four models, of the size of the first."""
    size, found = SCALES[scale], {}
    for name, variant in ARMS.items():
        task = recall_task(size, variant)
        target = parameters(next(iter(found.values())).model) if found else parameters(task.model)
        lengths = lengths_up_to(task.length, max_context or TIMES * task.length, 4)
        found[name] = task.model_copy(update={"model": match_parameters(task.model, target), "lengths": lengths})
    return found


def unit(task: RecallTask, seed: int, place: Workplace) -> Figures:
    """Train, then score and read at every length."""
    model, place.raw["mqar"] = train_recall(task, seed, place.say)
    folder = place.folder / "model"
    model.save_pretrained(folder)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        costs = other.submit(read_costs, folder, task.lengths, torch.get_num_threads()).result()
    figures: Figures = {}
    for length, cost in zip(task.lengths, costs, strict=True):
        figures[f"accuracy@{length}"] = score_recall(model, task, length)
        figures |= {f"{name}@{length}": value for name, value in cost.items()}
    return {**figures, "parameters": parameters(task.model)}


def read_costs(folder: Path, lengths: tuple[int, ...], threads: int) -> list[dict[str, Any]]:
    """Time, memory and state of reading one stream of each length, the shortest first: a peak never falls."""
    torch.set_num_threads(threads)
    model = load_model(folder).to(device())
    random, found = torch.Generator().manual_seed(0), []
    warm = torch.randint(model.config.vocab_size, (1, lengths[0]), generator=random).to(device())
    read(model, warm)
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), generator=random).to(device())
        seconds, state = [], None
        for _ in range(ROUNDS):
            began = time.perf_counter()
            state = read(model, ids, PIECE)
            if device().type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        assert state is not None
        told = {"ms": 1000 * median(seconds) / length, "memory": peak_bytes() / 1e6, "state": state.nbytes / 1e3}
        found.append(told)
    return found


def peak_bytes() -> int:
    """The most that this process, or the accelerator for it, has held so far."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # what `resource` tells there was begun by the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


EXPERIMENT = Experiment(
    name="scaling-analysis",
    purpose="Recall, time a token, memory and state against the length of the text: MAG, LMM, window, transformer.",
    arms=arms,
    unit=unit,
    columns={
        "accuracy": Column("MQAR", ".1%", over="length"),
        "ms": Column("ms per token", ".3f", over="length"),
        "memory": Column("peak memory, MB", ",.0f", over="length"),
        "state": Column("state, kB", ",.0f", over="length"),
        "parameters": Column("parameters", ",.0f", drawn=False),
    },
    inputs=("max_context",),
    note="Trained at the shortest length; a longer text hides the same pairs. Time, memory and state are of one "
    f"stream, read {PIECE:,} tokens a call, the median of {ROUNDS} readings; the memory is that of a whole process "
    "with Python and torch in it, or what the accelerator holds.",
)
