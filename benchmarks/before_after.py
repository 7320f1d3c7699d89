"""Is today's tree slower than an earlier one? The layer, a training step and a token, both trees turn about.

Each turn is a process of its own, one tree's ``src`` in front of the path; what is timed is its processor time, since a
shared machine has no steady clock. ``git worktree add /tmp/before COMMIT`` gives the earlier tree:
``python benchmarks/before_after.py --before /tmp/before``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import harness

WORK = """
import json, sys, time, torch
from titans import NeuralMemory, TitansConfig, build_model
torch.set_num_threads(1)
torch.manual_seed(0)

def timed(f, times):
    f()
    found = []
    for _ in range(times):
        start = time.process_time()
        f()
        found.append(time.process_time() - start)
    return sorted(found)[len(found) // 2]

def model(variant, layers, **changes):
    config = TitansConfig(variant=variant, vocab_size=256, d_model=256, n_layers=layers, chunk_size=64, **changes)
    return build_model(config)

out = {}
for chunk in (64, 16):
    layer, x = NeuralMemory(256, n_heads=4, chunk_size=chunk), torch.randn(2, 1024, 256, requires_grad=True)
    def step():
        layer(x).square().mean().backward()
        layer.zero_grad()
    out[f"layer, C = {chunk}"] = timed(step, 3)
for variant in ("MAC", "MAG"):
    net, ids = model(variant, 2, segment_len=128, window=128), torch.randint(256, (2, 512))
    def step():
        net(ids, labels=ids).loss.backward()
        net.zero_grad()
    out[f"training step, {variant}"] = timed(step, 3)
for variant in ("LMM", "MAC"):
    net, ids = model(variant, 4, segment_len=64).eval(), torch.randint(256, (1, 100))
    def tokens(count):
        return timed(lambda: net.generate(ids, count, temperature=0), 3)
    out[f"token, {variant}"] = (tokens(40) - tokens(1)) / 39
print(json.dumps(out))
"""


def measured(root: Path) -> dict[str, float]:
    """Seconds of processor time of one turn."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise harness.BenchmarkError(f"{root}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def run(options: argparse.Namespace) -> None:
    if not (options.before / "src" / "titans").is_dir():
        raise harness.BenchmarkError(f"--before {options.before} is no checkout")
    turns = [(measured(options.before), measured(harness.ROOT)) for _ in range(options.rounds)]
    records = []
    for name in turns[0][0]:
        before, after = zip(*((a[name], b[name]) for a, b in turns), strict=True)
        ratio = median(b / a for a, b in zip(before, after, strict=True))
        records.append({"what": name, "before": before, "after": after, "ratio": ratio})
    head = ("", "before, ms", "after, ms", "after / before")
    rows = [
        (r["what"], f"{1e3 * median(r['before']):.1f}", f"{1e3 * median(r['after']):.1f}", f"{r['ratio']:.2f}")
        for r in records
    ]
    print(harness.table(head, rows))
    harness.save(options.output, {"records": records})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="root of the earlier checkout")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    harness.add_common_options(parser)
    harness.main(run, parser)


if __name__ == "__main__":
    main()
