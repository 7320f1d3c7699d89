"""Is a fact found again when the text grows? BABILong-style questions, asked far beyond the length of training.

``titans experiment babilong --scale tiny --max-context 16384`` trains a MAG and the opponents on short texts;
with ``--model models/finder`` a finished model is asked instead, about all five kinds of worlds.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from experiments.framework.experiment import Column, Experiment, Figures, Workplace
from experiments.framework.recall import device
from experiments.framework.scales import SCALES, Scale, lengths_up_to, match_parameters, parameters, text_run
from experiments.framework.text import GivenModel, train_text
from titans import load_model
from titans.data import ByteTokenizer
from titans.evaluation import GROUPS, EvaluationError, TaskRows, evaluate
from titans.training import ConfigError, TrainConfig
from titans.training.data import load_saved_tokenizer

TRAINED_ON = "babilong_qa1"
# What differs from the scale's text models.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"length": 192, "samples": 50, "training": {"steps": 400, "batch_size": 20, "lr": 1e-2, "save_every": 100}},
    "small": {"length": 256, "samples": 100, "training": {"steps": 3000, "batch_size": 16, "save_every": 100}},
    "medium": {"length": 1024, "samples": 100, "training": {"batch_size": 64}},
    "large": {"length": 2048, "samples": 100, "training": {"batch_size": 64}},
}
TIMES = 16  # how far beyond training, unless --max-context says so
MATRIX: dict[str, Any] = {"mem_layers": 1, "mem_heads": 1, "use_decay": False}  # as finder's, docs/results/needles.md
ARMS: dict[str, dict[str, Any]] = {
    "mag": {"variant": "MAG", **MATRIX},
    "window": {"variant": "swa"},
    "transformer": {"variant": "transformer"},
}


class Asked(BaseModel):
    """A model, given or to be trained, and what it is asked.

    Args:
        source: the text that facts are scattered in.
        tasks, lengths, samples: as `titans.evaluation.evaluate`; the samples are the same for all arms and seeds.
        run: training of the model; None to ask ``model``.
        model: folder of a saved model.
        weights: SHA-256 of that model's weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    run: TrainConfig | None = None
    model: Path | None = None
    weights: str | None = None


def arms(
    scale: str, data: Path | None = None, model: Path | None = None, max_context: int | None = None
) -> dict[str, Asked]:
    """The given model, or the three that are trained, of the size of the first."""
    chosen, source = SIZES[scale], str(data or "stdlib")
    length = chosen["length"]
    lengths = lengths_up_to(length, max_context or TIMES * length, 2)
    asked: dict[str, Any] = {"source": source, "lengths": lengths, "samples": chosen["samples"]}
    try:
        TaskRows({TRAINED_ON: 1}, ByteTokenizer(), length, 1, text=source)  # what would fail later fails now
    except EvaluationError as error:
        raise ValueError(f"--data: {error}") from error
    if model is not None:
        given = GivenModel.of(model)
        return {given.name: Asked(**asked, tasks=GROUPS["babilong"], model=given.folder, weights=given.weights)}
    size = replace(SCALES[scale], training={**SCALES[scale].training, "eval_every": 0, **chosen["training"]})
    section = {"source": source, "length": length, "tasks": {TRAINED_ON: 1}, "questions": 3}
    runs = {name: _run(size, section, fields) for name, fields in ARMS.items()}
    target = parameters(runs["mag"].model)
    for name, run in runs.items():
        fitted = run.model_copy(update={"model": match_parameters(run.model, target)})
        runs[name] = fitted if SCALES[scale].preset is None else run
    return {name: Asked(**asked, tasks=(TRAINED_ON,), run=run) for name, run in runs.items()}


def _run(size: Scale, section: dict[str, Any], fields: dict[str, Any]) -> TrainConfig:
    fields = {"miras": None, **fields}
    return text_run(size, section, fields.pop("variant"), **fields)


def unit(asked: Asked, seed: int, place: Workplace) -> Figures:
    """The share of right answers at every length; trains the model if it must."""
    folder = asked.model if asked.run is None else train_text(asked.run, seed, place)
    assert folder is not None
    model = load_model(folder).to(device())
    tokenizer, output = load_saved_tokenizer(folder), place.folder / "answers"
    try:
        found = evaluate(
            model, tokenizer, asked.tasks, asked.lengths, asked.samples, output=output, text=asked.source, say=place.say
        )
    except EvaluationError as error:
        raise ConfigError(str(error)) from error
    cells = place.raw["cells"] = found["cells"]
    scored = [cell for cell in cells if "skipped" not in cell]
    figures = {f"{cell['task'].removeprefix('babilong_')}@{cell['length']}": cell["score"] for cell in scored}
    return {**figures, "state": scored[-1]["state_bytes"], "parameters": parameters(model.config)}


EXPERIMENT = Experiment(
    name="babilong",
    purpose="BABILong-style questions at growing lengths: MAG against attention of equal size, or --model.",
    arms=arms,
    unit=unit,
    columns={
        **{f"qa{i}": Column(f"qa{i}, right", ".0%", over="length") for i in range(1, 6)},
        "state": Column("bytes of state at the longest", ",.0f", drawn=False),
        "parameters": Column("parameters", ",.0f", drawn=False),
    },
    inputs=("data", "model", "max_context"),
    note="Trained on qa1 alone, at the shortest of the lengths; lengths are in bytes. Worlds and background are made "
    "here, so nothing compares with the published set. One of six places is right by chance; naming the place of the "
    "last fact, whoever it is about, is right in 47 % of whole stories.",
)
