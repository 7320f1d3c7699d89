"""Linear maps of a few vectors, as decoding has them: BLAS against one pass over the weights in C++, turn about.

Every call takes other weights, 20 MB in a circle, so that they come from where a model's do. Processor time.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import harness
import torch
import torch.nn.functional as F

from titans.ops.memory.native import vectors

SHAPES = ((256, 256), (1376, 256), (1024, 1024))
ROWS = (1, 2, 4, 8, 16)
CIRCLE = 20_000_000  # bytes


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    if reason := vectors.unavailable():
        raise harness.BenchmarkError(reason)
    torch.set_num_threads(options.threads)
    records = []
    for out, width in SHAPES:
        weights = [torch.randn(out, width) for _ in range(max(4, CIRCLE // (4 * out * width)))]
        for rows in ROWS:
            x = torch.randn(rows, 1, width)
            maps = {"BLAS": lambda w, x=x: F.linear(x, w), "C++": lambda w, x=x: vectors.linear(x, w, None)}
            seconds: dict[str, list[float]] = {name: [] for name in maps}
            for _ in range(options.rounds):
                for name, apply in maps.items():
                    start = time.process_time()
                    for w in weights:
                        apply(w)
                    seconds[name].append((time.process_time() - start) / len(weights))
            records.append({"out": out, "in": width, "rows": rows, "seconds": seconds})
    table = []
    for r in records:
        blas, own = (median(s) for s in r["seconds"].values())
        table.append((f"{r['out']} x {r['in']}", str(r["rows"]), f"{1e6 * blas:.0f}", f"{1e6 * own:.0f}"))
    print(harness.table(("weights", "vectors", "BLAS, µs", "C++, µs"), table))
    harness.save(options.output, {"records": records})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: %(default)s)")
    harness.add_common_options(parser)
    parser.set_defaults(threads=1)
    harness.main(run, parser)


if __name__ == "__main__":
    main()
