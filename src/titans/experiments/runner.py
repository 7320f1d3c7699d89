"""Running an experiment unit by unit; whatever was finished before is kept."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from titans.experiments.experiment import Experiment, Figures, Workplace
from titans.experiments.machine import made_with
from titans.experiments.report import Report, write_report
from titans.files import write_whole


@dataclass(frozen=True)
class Unit:
    """One arm at one seed."""

    arm: str
    seed: int
    settings: BaseModel

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """An experiment with everything chosen, checked against what the output folder holds.

    Args:
        experiment: what is run.
        scale: one of ``SCALES``.
        seeds: one unit per arm and seed.
        inputs: the files that the user gave, by the option's name.
        output: folder of ``units/``, ``runs/``, ``results.json``, ``table.md`` and ``figure.png``.
        units: all units, the arms of the first seed first.
        done: records of the finished ones by name.
    """

    experiment: Experiment
    scale: str
    seeds: tuple[int, ...]
    inputs: Mapping[str, Path]
    output: Path
    units: tuple[Unit, ...]
    done: Mapping[str, dict[str, Any]]

    @property
    def command(self) -> str:
        """The command that does this."""
        words = ["titans", "experiment", self.experiment.name, "--scale", self.scale]
        words += ["--seeds", ",".join(map(str, self.seeds)), "--output", str(self.output)]
        return shlex.join(words + [word for name, path in self.inputs.items() for word in (f"--{name}", str(path))])


def plan(
    experiment: Experiment,
    scale: str,
    seeds: Sequence[int],
    output: str | Path,
    inputs: Mapping[str, Path] | None = None,
) -> Plan:
    """List the units and find those that are finished. Writes nothing.

    Args:
        experiment: what to run.
        scale: "tiny", "small", "medium" or "large".
        seeds: of weights and data, each once.
        output: folder, new or of the same experiment.
        inputs: the files that the user gave, by the option's name.

    Raises:
        ValueError: an input that the experiment does not take, or an output folder with units of other settings.
        OSError: missing data.
    """
    inputs, output = inputs or {}, Path(output)
    for name in inputs:
        if name not in experiment.inputs:
            raise ValueError(f"--{name}: {experiment.name} takes none")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"--seeds: each seed once, got {','.join(map(str, seeds)) or 'none'}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file")
    arms = experiment.arms(scale, **inputs)
    units = tuple(Unit(arm, seed, settings) for seed in seeds for arm, settings in arms.items())
    done = {path.stem: _read(path, experiment) for path in sorted((output / "units").glob("*.json"))}
    for unit in units:
        if unit.name in done:
            _check_same(_plain(unit), done[unit.name]["settings"], output / "units" / f"{unit.name}.json")
    wanted = {unit.name for unit in units}
    done = {name: record for name, record in done.items() if name in wanted}
    return Plan(experiment, scale, tuple(seeds), inputs, output, units, done)


def run(work: Plan, console: Console | None = None) -> Report:
    """Run what is left of the plan, then write results.json, table.md and figure.png.

    A unit's record appears whole when the unit is done. A unit whose loss or gradients become non-finite is done as
    well: its record says so instead of figures.

    Raises:
        ConfigError: training data that cannot be used.
        Stopped: a signal came while a text model trained, and its checkpoint is saved.
    """
    console = Console(stderr=True) if console is None else console
    records = dict(work.done)
    spent = {name: record["seconds"] for name, record in records.items()}
    started = time.perf_counter()
    for number, unit in enumerate(work.units, 1):
        place = Workplace(work.output / "runs" / unit.name, console)
        head = f"[{number}/{len(work.units)}] {unit.arm}, seed {unit.seed}"
        if unit.name in records:
            place.say(f"{head}: finished before, kept")
            continue
        place.say(head)
        record = _run_unit(work.experiment, unit, place)
        write_whole(work.output / "units" / f"{unit.name}.json", lambda path, r=record: _write_json(path, r))
        records[unit.name], spent[unit.name] = record, record["seconds"]
        left = _time_left(work.units[number:], records, spent)
        elapsed = time.perf_counter() - started
        outcome = record.get("failure") or _shown(work.experiment, record["figures"])
        place.say(f"{head}: {outcome}  ({record['seconds']:.0f} s; {_span(elapsed)} so far, about {_span(left)} left)")
    kept = tuple(records[unit.name] for unit in work.units)
    report = Report(work.experiment, work.command, work.scale, work.seeds, kept)
    write_report(report, work.output)
    return report


def _run_unit(experiment: Experiment, unit: Unit, place: Workplace) -> dict[str, Any]:
    began = time.perf_counter()
    outcome: dict[str, Any]
    try:
        figures = experiment.unit(unit.settings, unit.seed, place)
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"{experiment.heading(broken[0])} is {figures[broken[0]]}")
        outcome = {"figures": figures}
    except FloatingPointError as error:
        outcome = {"figures": {}, "failure": str(error)}
    told = {"experiment": experiment.name, "arm": unit.arm, "seed": unit.seed, "settings": _plain(unit)}
    return {**told, **outcome, "seconds": round(time.perf_counter() - began, 1), "made_with": made_with()}


def _read(path: Path, experiment: Experiment) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, _ = record["experiment"], record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--output: {path} is no unit of an experiment; choose another --output") from error
    if name != experiment.name:
        raise ValueError(f"--output: {path} belongs to {name}; choose another --output")
    return record


def _check_same(now: Any, before: Any, path: Path, field: str = "") -> None:
    """Refuse a finished unit whose settings are not those of the plan; names the first field that differs."""
    if isinstance(now, dict) and isinstance(before, dict):
        for name in [*now, *(name for name in before if name not in now)]:
            _check_same(now.get(name), before.get(name), path, f"{field}.{name}" if field else name)
    elif now != before:
        raise ValueError(
            f"--output: {path} was made with {field} = {before!r}, now it is {now!r}; choose another --output"
        )


def _plain(unit: Unit) -> dict[str, Any]:
    """The settings as a JSON file gives them back."""
    return json.loads(unit.settings.model_dump_json())


def _time_left(units: Sequence[Unit], records: Mapping[str, Any], spent: Mapping[str, float]) -> float:
    """Seconds for the units to come: what their arm took at another seed, else the mean of all."""
    by_arm = {record["arm"]: record["seconds"] for record in records.values()}
    return sum(by_arm.get(unit.arm, mean(spent.values())) for unit in units if unit.name not in records)


def _shown(experiment: Experiment, figures: Figures) -> str:
    return "; ".join(f"{experiment.heading(name)}: {experiment.shown(name, value)}" for name, value in figures.items())


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
