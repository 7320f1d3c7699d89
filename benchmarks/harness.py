"""Turn-about timing of contestants that live in processes, and Python environments, of their own.

Every contestant is one worker process. The driver writes one JSON line per command to its stdin and reads one JSON line
back: "build" prepares it, "step" runs one timed step, "peak" asks for its peak resident memory. "check" is asked of a
process that does nothing else, so that its memory is in nobody's figures. All workers are in memory at once, only one
computes at a time, and they take turns (A B C A B C ...), so that whatever else happens on the machine falls on all of
them alike. Needs nothing but the standard library: the driver never imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], float]
Build = Callable[[dict], tuple[Step, dict]]


class BenchmarkError(Exception):
    """Something that the person at the keyboard can put right; shown as one line."""


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        key: short name, for --contestants and the JSON file.
        title: what it is, for the table.
        python: interpreter of its environment; None: this one.
        settings: what the worker's ``build`` receives, on top of the settings common to all.
        checked: its worker compares itself with a reference first, and there is no report if they differ.
        slow: takes part in the first --slow-rounds rounds only, after a single warm-up step.
        tokens: tokens per step, where they differ from everybody else's.
    """

    key: str
    title: str
    settings: dict
    python: str | None = None
    checked: bool = False
    slow: bool = False
    tokens: int | None = None


@dataclass
class Result:
    """What was measured; ``seconds`` has one entry per round, None where the contestant sat out."""

    contestant: Contestant
    tokens: int
    info: dict
    seconds: list[float | None] = field(default_factory=list)
    peak_rss_bytes: int = 0

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each step."""
        return [self.tokens / s for s in self.seconds if s is not None]


# --- the worker's side ---


def serve(build: Build, check: Callable[[dict], dict]) -> None:
    """Answer the driver until it hangs up. What libraries print goes to stderr, never between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    step: Step | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["command"] == "build":
                step, info = build(request["settings"])
                answer(info=info)
            elif request["command"] == "check":
                answer(info=check(request["settings"]))
            elif request["command"] == "step" and step is not None:
                answer(seconds=step())
            elif request["command"] == "peak":
                answer(peak_rss_bytes=peak_rss_bytes())
            else:
                raise BenchmarkError(f"unexpected command {request['command']!r}")
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")


def peak_rss_bytes() -> int:
    """This process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def timed(prepare: Callable[[], object], work: Callable[[], object]) -> Step:
    """A step that runs ``prepare`` off the clock and ``work`` on it."""

    def step() -> float:
        prepare()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return step


# --- the driver's side ---


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, script: Path, threads: int):
        self.contestant = contestant
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        environment = environment_of(contestant.python)
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        self.process = subprocess.Popen(
            [contestant.python or sys.executable, str(script), "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def ask(self, command: str, **fields: object) -> dict:
        """Send one command, wait for its answer."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({"command": command, **fields}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}
        if "error" in answer:
            self.log.seek(0)
            print(*self.log.readlines()[-40:], sep="", end="", file=sys.stderr)
            raise BenchmarkError(f"{self.contestant.title}: {answer['error']}")
        return answer


def environment_of(python: str | None) -> dict[str, str]:
    """Environment variables of a worker. A peer's must not find our src/, where a drop-in package has its name."""
    return {k: v for k, v in os.environ.items() if python is None or k != "PYTHONPATH"}


def race(
    contestants: Sequence[Contestant], script: Path, common: dict, tokens: int, options: argparse.Namespace
) -> list[Result]:
    """Check and build every contestant, warm it up, then let them take turns.

    Args:
        contestants: in their order of play.
        script: the benchmark's own file; ``--worker`` makes it serve.
        common: settings that all contestants share.
        tokens: tokens per step.
        options: parsed options of ``add_race_options``.
    """
    for contestant in contestants:
        check_python(contestant)
    results, workers = [], []
    with ExitStack() as stack:
        for contestant in contestants:
            settings, checked = {**common, **contestant.settings}, {}
            if contestant.checked:
                note(f"comparing with the reference: {contestant.title}")
                with Worker(contestant, script, options.threads) as worker:
                    checked = worker.ask("check", settings=settings)["info"]
            note(f"building and warming up: {contestant.title}")
            worker = stack.enter_context(Worker(contestant, script, options.threads))
            info = {**worker.ask("build", settings=settings)["info"], **checked}
            for _ in range(1 if contestant.slow else options.warmup):
                worker.ask("step")
            workers.append(worker)
            results.append(Result(contestant, contestant.tokens or tokens, info))
        for turn in range(options.rounds):
            for worker, result in zip(workers, results, strict=True):
                sits_out = result.contestant.slow and turn >= options.slow_rounds
                result.seconds.append(None if sits_out else worker.ask("step")["seconds"])
            note(f"round {turn + 1} of {options.rounds}")
        for worker, result in zip(workers, results, strict=True):
            result.peak_rss_bytes = worker.ask("peak")["peak_rss_bytes"]
    return results


def check_python(contestant: Contestant) -> None:
    """Refuse early where a contestant's environment is not there."""
    python = contestant.python
    if python is not None and not os.access(python, os.X_OK):
        where = f"no interpreter at {python!r}" if python else "its option with the path of its interpreter is missing"
        raise BenchmarkError(
            f"{contestant.title}: {where}. benchmarks/README.md says how to create the environment; "
            f"--contestants leaves it out."
        )


def ratios(result: Result, other: Result) -> list[float]:
    """How many times faster than ``other``, round by round, where both took part."""
    return [
        (result.tokens / mine) / (other.tokens / theirs)
        for mine, theirs in zip(result.seconds, other.seconds, strict=True)
        if mine is not None and theirs is not None
    ]


def spread(values: Sequence[float]) -> dict:
    """Median, smallest, largest and how many."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def race_table(results: Sequence[Result], rivals_of: Sequence[str]) -> str:
    """One row per contestant; per key in ``rivals_of`` a column "how many times faster that one is"."""
    heroes = [r for r in results if r.contestant.key in rivals_of]
    head = ["", "tokens/s, median", "min to max", "steps", "peak RSS", *(f"{h.contestant.title} is" for h in heroes)]
    rows = []
    for result in results:
        rate = spread(result.rates)
        row = [result.contestant.title, f"{rate['median']:,.0f}", f"{rate['min']:,.0f} to {rate['max']:,.0f}"]
        row += [str(rate["n"]), f"{result.peak_rss_bytes / 1e9:.2f} GB"]
        for hero in heroes:
            ratio = spread(ratios(hero, result))
            row.append("" if hero is result else f"{ratio['median']:.3g}x ({ratio['min']:.3g} to {ratio['max']:.3g})")
        rows.append(row)
    return table(head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| "
        + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def race_record(results: Sequence[Result], rivals_of: Sequence[str]) -> list[dict]:
    """The results as JSON: raw seconds beside what was made of them."""
    heroes = [r for r in results if r.contestant.key in rivals_of]
    return [
        {
            "key": r.contestant.key,
            "title": r.contestant.title,
            "settings": r.contestant.settings,
            "info": r.info,
            "tokens_per_step": r.tokens,
            "seconds": r.seconds,
            "tokens_per_second": spread(r.rates),
            "peak_rss_bytes": r.peak_rss_bytes,
            "times_faster": {h.contestant.key: spread(ratios(h, r)) for h in heroes if h is not r},
        }
        for r in results
    ]


def save(path: Path | None, record: dict) -> None:
    """Write the record with the command and the machine in front of it."""
    if path is None:
        return
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "finished": when, "machine": machine(), **record}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    note(f"written: {path}")


def machine() -> dict:
    """Processor, cores, memory, load, and the commit that was measured."""
    facts = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    cpuinfo, meminfo = (p.read_text() if p.exists() else "" for p in facts)
    model = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemTotal")]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "system": platform.platform(),
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory[0] if memory else None,
        "load_average_1_5_15": os.getloadavg(),
        "commit": git.stdout.strip() or None,
    }


def note(text: str) -> None:
    """Progress, kept apart from the table on stdout."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- options ---


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark."""
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write a JSON file with all raw timings")


def add_race_options(parser: argparse.ArgumentParser, rounds: int, warmup: int) -> None:
    """Options of the benchmarks that race worker processes."""
    add_common_options(parser)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=warmup, help="untimed steps of each (default: %(default)s)")
    parser.add_argument("--slow-rounds", type=int, default=2, help="timed steps of slow ones (default: %(default)s)")
    parser.add_argument("--contestants", nargs="+", metavar="KEY", help="only these; an unknown key lists them all")
    parser.add_argument("--titans-pytorch-python", default="", metavar="PATH", help="python with titans-pytorch")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def choose(contestants: Sequence[Contestant], keys: Sequence[str] | None, default: Sequence[str]) -> list[Contestant]:
    """The contestants asked for, in their order of play."""
    known = {c.key for c in contestants}
    wanted = set(keys or default)
    if unknown := wanted - known:
        raise BenchmarkError(f"unknown contestant {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
    return [c for c in contestants if c.key in wanted]


def main(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse and run; what the user can put right ends in one line and status 2."""
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # through the clean-up: no worker stays behind
    for name in ("threads", "rounds", "slow_rounds"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        run(options)
    except BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
