"""What rows of different lengths cost: a ragged batch against a uniform one with as many cells of the chunk grid.

Forward and backward of one memory layer, turn about in one process, processor time. "padded": five tokens of padding at
the left of one row; "mixed": rows of three quarters and all of T from different places of their chunks; "packed": eight
documents in each row. The uniform batch that each is divided by is as long as the longest row's grid.
Run ``python benchmarks/ragged.py --help``.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import harness

KINDS = ("padded", "mixed", "packed")


def rows_of(kind: str, tokens: int, chunk: int):
    """Where the rows of a batch of two stand."""
    from titans.ops.rows import Rows

    if kind == "padded":
        return Rows((0, 0), (tokens - 5, tokens), tokens)
    if kind == "mixed":
        return Rows((3, chunk + 7), (tokens * 3 // 4, tokens), tokens)
    starts = tuple(tokens * i // 8 + 1 for i in range(1, 8))
    return Rows((0, 0), (tokens, tokens), tokens, (starts, starts))


def measure(options: argparse.Namespace) -> list[dict]:
    """One record per kind and length."""
    import torch

    from titans import NeuralMemory
    from titans.ops.grid import Grid
    from titans.ops.rows import Rows

    torch.manual_seed(0)
    layer = NeuralMemory(options.width, n_heads=options.heads, chunk_size=options.chunk, engine=options.engine)
    state = layer(torch.randn(2, 2 * options.chunk, options.width), return_state=True)[1].detach()

    def step(rows: Rows) -> float:
        x = torch.randn(2, rows.tokens, options.width, requires_grad=True)
        begun = state if any(rows.seen) else None
        start = time.process_time()
        layer(x, begun, return_state=True, rows=rows)[0].square().mean().backward()
        return time.process_time() - start

    records = []
    for tokens in options.tokens:
        contestants = {"uniform": Rows.whole((0, 0), tokens)}
        for kind in KINDS:
            rows = rows_of(kind, tokens, options.chunk)
            contestants[kind] = rows
            contestants[f"as many cells as {kind}"] = Rows.whole((0, 0), sum(Grid.of(rows, options.chunk).widths))
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(options.rounds + 1):
            for name, rows in contestants.items():
                found = step(rows)
                if turn:
                    seconds[name].append(found)
        for kind in KINDS:
            pairs = zip(seconds[kind], seconds[f"as many cells as {kind}"], strict=True)
            ratio = [a / b for a, b in pairs]
            record = {"tokens": tokens, "kind": kind, "seconds": median(seconds[kind]), "ratio": median(ratio)}
            records.append({**record, "ratios": ratio, "uniform_seconds": median(seconds["uniform"])})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--engine", default="chunked")
    parser.add_argument("--rounds", type=int, default=5)
    harness.add_common_options(parser)
    harness.main(run, parser)


def run(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    records = measure(options)
    head = ("tokens", "batch", "seconds", "over a uniform one of as many cells")
    lines = [(str(r["tokens"]), r["kind"], f"{r['seconds']:.2f}", f"{r['ratio']:.2f}") for r in records]
    print(harness.table(head, lines))
    for kind in KINDS:
        times = [r["seconds"] for r in records if r["kind"] == kind]
        if len(times) > 1:
            print(f"{kind}: {options.tokens[-1]} tokens take {times[-1] / times[0]:.2f} times {options.tokens[0]}'s")
    harness.save(options.output, {"records": records})


if __name__ == "__main__":
    main()
