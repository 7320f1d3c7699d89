"""Running an experiment unit by unit; whatever was finished before is kept."""

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

from experiments.framework.experiment import Experiment, Workplace
from experiments.framework.machine import made_with
from experiments.framework.report import Report, write_json, write_report
from titans.files import check_ours


@dataclass(frozen=True)
class Unit:
    """One arm at one seed."""

    arm: str
    seed: int
    settings: BaseModel

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def told(self) -> dict[str, Any]:
        """What its record begins with, as a JSON file gives it back."""
        return {"arm": self.arm, "seed": self.seed, "settings": json.loads(self.settings.model_dump_json())}


@dataclass(frozen=True)
class Plan:
    """An experiment with everything chosen, checked against what the output folder holds.

    Args:
        experiment, scale: what is run.
        command: that does this.
        output: folder of ``units/``, ``runs/``, ``results.json``, ``table.md`` and ``figure.png``.
        units: all units, the arms of the first seed first.
        done: records of finished ones by name, and of other rows.
    """

    experiment: Experiment
    scale: str
    command: str
    output: Path
    units: tuple[Unit, ...]
    done: Mapping[str, dict[str, Any]]


def plan(
    experiment: Experiment,
    scale: str,
    seeds: Sequence[int],
    output: str | Path,
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """List the units and find those that are finished. Writes nothing.

    Args:
        experiment: what to run.
        scale: "tiny", "small", "medium" or "large".
        seeds: of weights and data, each once.
        output: folder, new or of the same experiment.
        inputs: what the user gave, by the option's name.

    Raises:
        ValueError: an input that the experiment does not take, or an output folder with units of other settings.
        OSError: missing data.
    """
    inputs, output = inputs or {}, Path(output)
    words = ["titans", "experiment", str(experiment.file or experiment.name), "--scale", scale]
    words += ["--seeds", ",".join(map(str, seeds)), "--output", str(output)]
    for name, value in inputs.items():
        option = f"--{name.replace('_', '-')}"
        if name not in experiment.inputs:
            raise ValueError(f"{option}: {experiment.name} takes none")
        words += [word for one in (value if name == "set" else [value]) for word in (option, str(one))]
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"--seeds: each seed once, got {','.join(map(str, seeds)) or 'none'}")
    check_ours(output, ("results.json", "table.md", "figure.png"), "units")
    arms = experiment.arms(scale, **inputs)
    units = {unit.name: unit for unit in (Unit(arm, seed, arms[arm]) for seed in seeds for arm in arms)}
    done = {}
    for path in sorted((output / "units").glob("*.json")):
        record = _read(path, experiment, units.get(path.stem))
        if path.stem in units or "row" in inputs:
            done[path.stem] = record
    return Plan(experiment, scale, shlex.join(words), output, tuple(units.values()), done)


def run(work: Plan, console: Console | None = None) -> Report:
    """Run what is left of the plan, then write results.json, table.md and figure.png.

    A unit's record appears whole when the unit is done. A unit whose loss or gradients become non-finite is done as
    well: its record says so instead of figures.

    Raises:
        ConfigError: training data that cannot be used.
        Stopped: a signal came while a text model trained, and its checkpoint is saved.
    """
    console = Console(stderr=True) if console is None else console
    records, started = dict(work.done), time.perf_counter()
    for number, unit in enumerate(work.units, 1):
        place = Workplace(work.output / "runs" / unit.name, console)
        head = f"[{number}/{len(work.units)}] {unit.arm}, seed {unit.seed}"
        if unit.name in records:
            place.say(f"{head}: finished before, kept")
            continue
        place.say(head)
        record = records[unit.name] = _run_unit(work, unit, place)
        write_json(work.output / "units" / f"{unit.name}.json", record)
        left = sum(later.name not in records for later in work.units) * mean(r["seconds"] for r in records.values())
        elapsed = time.perf_counter() - started
        shown = [f"{work.experiment.heading(x)}: {work.experiment.shown(x, y)}" for x, y in record["figures"].items()]
        outcome = record.get("failure") or "; ".join(shown)
        place.say(
            f"{head}: {outcome}  ({record['seconds']:.0f} s; {elapsed / 60:.1f} min so far, about {left / 60:.1f} left)"
        )
    mine = [unit.name for unit in work.units]
    kept = [records[name] for name in [*(name for name in records if name not in mine), *mine]]
    report = Report(work.experiment, work.scale, tuple(kept), work.command)
    write_report(report, work.output)
    return report


def _run_unit(work: Plan, unit: Unit, place: Workplace) -> dict[str, Any]:
    began = time.perf_counter()
    experiment, failure = work.experiment, {}
    try:
        figures = experiment.unit(unit.settings, unit.seed, place)
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{experiment.heading(name)} is {value}")
    except FloatingPointError as error:
        figures, failure = {}, {"failure": str(error)}
    made = {"seconds": round(time.perf_counter() - began, 1), "command": work.command, "made_with": made_with()}
    return {"experiment": experiment.name, **unit.told, "figures": figures, **failure, **made, "raw": place.raw}


def _read(path: Path, experiment: Experiment, unit: Unit | None) -> dict[str, Any]:
    """The record of a finished unit; refuses one of another experiment, or of other settings than ``unit``'s."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = {name: record[name] for name in ("experiment", "settings")}
        _check_unit(record, experiment)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--output: {path} is no unit of an experiment; choose another --output") from error
    settings = before["settings"] if unit is None else unit.told["settings"]
    _check_same({"experiment": experiment.name, "settings": settings}, before, path)
    return record


def _check_unit(record: dict[str, Any], experiment: Experiment) -> None:
    """Raise a TypeError or KeyError where the record lacks what a report reads from it."""
    figures = record["figures"]
    kinds = (("arm", str), ("seed", int), ("seconds", int | float), ("figures", dict))
    if record["experiment"] == experiment.name and not {name.partition("@")[0] for name in figures} <= {
        *experiment.columns
    }:
        raise KeyError("figures")
    if not all(isinstance(record[name], kind) for name, kind in kinds) or not all(
        isinstance(value, int | float) for value in figures.values()
    ):
        raise TypeError("figures")


def _check_same(now: Any, before: Any, path: Path, field: str = "") -> None:
    """Refuse what a finished unit was not made with; names the first field that differs."""
    if isinstance(now, dict) and isinstance(before, dict):
        for name in {**now, **before}:
            _check_same(now.get(name), before.get(name), path, f"{field}.{name}" if field else name)
    elif now != before:
        made = f"{path} was made with {field} = {before!r}, now it is {now!r}"
        raise ValueError(f"--output: {made}; choose another --output")
