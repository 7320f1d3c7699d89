"""The engines of the memory scan against each other and against the matrix products that they cannot do without.

One process, forward and backward to every input, the engines taking turns, float32. All of them get the same tensors in
the layer's layout [B, T, H, D], so the copies into rows count for each. Before anything is timed, outputs and gradients
must agree with those of the chunked engine, in float64 and over a few chunks (over many, the titans rule multiplies
rounding errors without bound: docs/results/lasting.md). Seconds are those of the processor (all threads together) and
of the clock; on a shared machine only the former and the ratios mean anything. "Share of the limit" is the time of the
necessary products alone, batched over rows, divided by the engine's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import harness
import torch
import torch.nn.functional as F
from harness import BenchmarkError
from torch import Tensor

from titans.miras import MirasConfig
from titans.ops.memory import fused, memory_scan, native
from titans.ops.memory.chunk_rule import ChunkRule
from titans.ops.memory.tokens import Gates, Tokens

TOLERANCE = 1e-9  # of the largest entry
CHECKED_CHUNKS = 9
GATES = ("theta", "eta", "alpha")
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """Sizes and rule of one table."""

    rule: str
    chunk: int
    tokens: int
    batch: int
    heads: int
    width: int
    hidden: int

    @property
    def rows(self) -> int:
        return self.batch * self.heads


@dataclass(frozen=True)
class Problem:
    """Leaf tensors of one setting by name; vectors [B, T, H, D], gates [B, T, H], weights [H, out, in], norm [H, D]."""

    setting: Setting
    leaves: dict[str, Tensor]
    cotangent: Tensor

    @classmethod
    def random(cls, setting: Setting, dtype: torch.dtype) -> Problem:
        random = torch.Generator().manual_seed(0)
        vectors = (setting.batch, setting.tokens, setting.heads, setting.width)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        top = {"theta": 0.3 / setting.width, "eta": 0.9, "alpha": 0.02}
        found = {name: F.normalize(normal(*vectors), dim=-1) for name in ("q", "k")} | {"v": normal(*vectors)}
        found |= {name: torch.rand(*vectors[:3], generator=random) * top[name] for name in GATES}
        found["first"] = normal(setting.heads, setting.hidden, setting.width) * setting.width**-0.5
        found["last"] = normal(setting.heads, setting.width, setting.hidden) * setting.hidden**-0.5
        found["gain"], found["bias"] = torch.ones(setting.heads, setting.width), torch.zeros(*vectors[2:])
        leaves = {name: x.to(dtype).requires_grad_() for name, x in found.items()}
        return cls(setting, leaves, normal(*vectors).to(dtype))

    def gradients(self, run: Run) -> list[Tensor]:
        """Output and gradients of one step."""
        y = run()
        return [y.detach(), *torch.autograd.grad(y, list(self.leaves.values()), self.cotangent)]

    def engines(self) -> dict[str, Run]:
        found: dict[str, Run] = {"chunked": self.chunked, "fused": lambda: self.by(fused.run_chunks)}
        if native.available():
            return found | {"native": lambda: self.by(native.run_chunks)}
        harness.note(f"without native: {native.unavailable()}")
        return found

    def chunked(self) -> Tensor:
        x, s = self.leaves, self.setting
        y, _ = memory_scan(
            *(x[name] for name in ("q", "k", "v", *GATES)), weights=(x["first"], x["last"]),
            miras=getattr(MirasConfig, s.rule)(), chunk_size=s.chunk, norm=(x["gain"], x["bias"]), engine="chunked",
        )  # fmt: skip
        return y

    def by(self, engine: Callable) -> Tensor:
        """With one of the fast engines, from the layer's layout and back."""
        x, s = self.leaves, self.setting
        tokens = (x[name].transpose(1, 2).flatten(0, 1) for name in ("q", "k", "v", *GATES))
        weights = tuple(x[name].expand(s.batch, -1, -1, -1).flatten(0, 1) for name in ("first", "last"))
        gain, bias = (x[name].expand(s.batch, -1, -1).flatten(0, 1).unsqueeze(1) for name in ("gain", "bias"))
        rule = ChunkRule.of(getattr(MirasConfig, s.rule)(), s.chunk, weights, gain, bias)
        momentum = tuple(torch.zeros_like(w) for w in weights)
        q, k, v, *gates = tokens
        y, _, _ = engine(rule, Tokens(q, k, v, Gates(*gates, None)), weights, momentum)
        return y.unflatten(0, (s.batch, s.heads)).transpose(1, 2)


def products(s: Setting) -> Callable[[], None]:
    """The matrix products of a forward and backward pass, nothing between them (docs/math.md, cost)."""
    C, D, H = s.chunk, s.width, s.hidden
    # Rows, inner and columns of a product, and how many per chunk: forward + backward.
    shapes = [
        (C, D, H, 4 + 7), (C, H, D, 3 + 8), (H, C, D, 2 + 3), (D, C, H, 2 + 4),
        (C, D, C, 1 + 1), (C, H, C, 1 + 1), (C, C, H, 1 + 3), (C, C, D, 1 + 3),
    ]  # fmt: skip
    made = [
        (torch.randn(s.rows, m, k), torch.randn(s.rows, k, n), torch.empty(s.rows, m, n), count)
        for m, k, n, count in shapes
    ]

    def run() -> None:
        for _ in range(s.tokens // C):
            for x, y, out, count in made:
                for _ in range(count):
                    torch.bmm(x, y, out=out)

    return run


def check(problem: Problem) -> None:
    """Refuse to time an engine that computes something else."""
    wanted = problem.gradients(problem.chunked)
    for name, run in problem.engines().items():
        for of, found, reference in zip(("y", *problem.leaves), problem.gradients(run), wanted, strict=True):
            error = ((found - reference).abs().max() / reference.abs().max().clamp(min=1e-3)).item()
            if not error <= TOLERANCE:
                raise BenchmarkError(f"{name}: {of} is off by {error:.1e} of its largest entry")


def measure(setting: Setting, options: argparse.Namespace) -> list[list[str]]:
    """Rows of one table."""
    check(Problem.random(replace(setting, tokens=min(setting.tokens, CHECKED_CHUNKS * setting.chunk)), torch.float64))
    problem = Problem.random(setting, torch.float32)
    engines = problem.engines()
    steps = {name: lambda run=run: problem.gradients(run) for name, run in engines.items()}
    steps["products alone"] = products(setting)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(options.warmup + options.rounds):
        for name, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            took = time.process_time() - start[0], time.perf_counter() - start[1]
            if turn >= options.warmup:
                seconds[name].append(took)
    return [row(setting, name, seconds) for name in steps]


def row(setting: Setting, name: str, seconds: dict[str, list[tuple[float, float]]]) -> list[str]:
    """One engine's line: rates, and ratios taken round by round."""

    def ratio(other: str) -> str:
        found = (theirs[0] / mine[0] for mine, theirs in zip(seconds[name], seconds[other], strict=True))
        return f"{statistics.median(found):.2f}"

    tokens = setting.batch * setting.tokens
    cpu, clock = (statistics.median(s[i] for s in seconds[name]) for i in (0, 1))
    rule = f"{setting.rule}, C = {setting.chunk}"
    return [
        rule, name, f"{1e3 * cpu:,.0f} ms", f"{tokens / cpu:,.0f}", f"{tokens / clock:,.0f}", ratio("chunked"),
        ratio("products alone"),
    ]  # fmt: skip


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    rows = []
    for rule in options.rules:
        for chunk in options.chunks:
            if options.tokens % chunk:
                raise BenchmarkError(f"--tokens must be a multiple of {chunk}, got {options.tokens}")
            width = options.width // options.heads
            setting = Setting(rule, chunk, options.tokens, options.batch, options.heads, width, 4 * width)
            rows += measure(setting, options)
            harness.note(f"{rule}, C = {chunk}: done")
    head = ["", "engine", "CPU time", "tokens/s of CPU time", "tokens/s", "times chunked", "share of the limit"]
    print(harness.table(head, rows))
    harness.save(options.output, {"settings": vars(options) | {"output": None}, "head": head, "rows": rows})


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_common_options(found)
    found.add_argument("--rounds", type=int, default=7, help="timed steps of each (default: %(default)s)")
    found.add_argument("--warmup", type=int, default=1, help="untimed steps of each (default: %(default)s)")
    found.add_argument("--rules", nargs="+", choices=("steady", "titans"), default=["steady", "titans"])
    found.add_argument("--chunks", nargs="+", type=int, default=[64, 16], help="chunk sizes (default: 64 16)")
    found.add_argument("--tokens", type=int, default=4096, help="per sample (default: %(default)s)")
    found.add_argument("--batch", type=int, default=2, help="samples (default: %(default)s)")
    found.add_argument("--width", type=int, default=256, help="of the layer (default: %(default)s)")
    found.add_argument("--heads", type=int, default=4, help="of the memory (default: %(default)s)")
    return found


if __name__ == "__main__":
    harness.main(main, parser())
