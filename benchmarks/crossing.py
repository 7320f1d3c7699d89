"""From which length on is a memory cheaper than full attention? MAG against a Transformer of equal size.

Processor time of one thread per token, batch 1, of a training step (forward with loss and backward) and of a prefill
(forward without gradients, logits of the last token). The two take turns in one process at every length, so that
whatever else the machine does falls on both alike; "times" is the median, turn by turn. The Transformer has MAG's
blocks, convolution included, and a feed-forward layer so much wider that both have as many parameters.

``python benchmarks/crossing.py --rounds 5 --picture docs/images/crossing.png``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import harness
import torch

from titans import TitansConfig, build_model
from titans.models.language_model import TitansModel

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SIZE = {"vocab_size": 256, "d_model": 256, "n_layers": 4}


def pair() -> tuple[TitansModel, TitansModel]:
    """MAG, and a Transformer with as many parameters."""
    torch.manual_seed(0)
    mag = build_model(TitansConfig(variant="MAG", window=128, chunk_size=64, **SIZE))
    wanted = count(mag)

    def transformer(mult: float) -> TitansModel:
        return build_model(TitansConfig(variant="transformer", ffn_mult=mult, **SIZE))

    best = min((4 + i / 8 for i in range(64)), key=lambda mult: abs(count(transformer(mult)) - wanted))
    return mag, transformer(best)


def count(model: TitansModel) -> int:
    return sum(p.numel() for p in model.parameters())


def train(model: TitansModel, ids: torch.Tensor) -> None:
    model(ids, labels=ids).loss.backward()  # type: ignore[union-attr]
    model.zero_grad()


@torch.no_grad()
def prefill(model: TitansModel, ids: torch.Tensor) -> None:
    model(ids, logits_to_keep=1)


def timed(work: Callable[[TitansModel, torch.Tensor], None], model: TitansModel, ids: torch.Tensor) -> float:
    start = time.process_time()
    work(model, ids)
    return time.process_time() - start


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    mag, transformer = pair()
    harness.note(f"MAG {count(mag):,} parameters, Transformer {count(transformer):,}")
    records = []
    for tokens in options.lengths:
        ids = torch.randint(256, (1, tokens))
        for name, work in (("training step", train), ("prefill", prefill)):
            turns = [tuple(timed(work, model, ids) for model in (mag, transformer)) for _ in range(options.rounds + 1)][
                1:
            ]
            times = [theirs / ours for ours, theirs in turns]
            records.append({"what": name, "tokens": tokens, "seconds": turns, "times": times})
            harness.note(f"{name} of {tokens:,}: MAG is {median(times):.2f} times as fast")
    rows = [
        (
            f"{r['what']}, {r['tokens']:,} tokens",
            *(f"{1e6 * median(t[i] for t in r['seconds']) / r['tokens']:,.0f}" for i in (0, 1)),
            f"{median(r['times']):.2f} ({min(r['times']):.2f} to {max(r['times']):.2f})",
        )
        for r in records
    ]
    print(harness.table(("", "MAG, µs per token", "Transformer", "MAG is so many times as fast"), rows))
    harness.save(options.output, {"parameters": [count(mag), count(transformer)], "size": SIZE, "records": records})
    if options.picture is not None:
        draw(records, options.picture)


def draw(records: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("training step", "prefill"), strict=True):
        mine = [r for r in records if r["what"] == name]
        lengths = [r["tokens"] for r in mine]
        for i, (label, color) in enumerate((("MAG", "tab:blue"), ("Transformer", "tab:orange"))):
            cost = [1e6 * median(t[i] for t in r["seconds"]) / r["tokens"] for r in mine]
            axes.plot(lengths, cost, marker="o", color=color, label=label)
        axes.set(xscale="log", title=name, xlabel="tokens", ylabel="µs per token")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    harness.note(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="also draw it")
    harness.add_common_options(parser)
    parser.set_defaults(threads=1)
    harness.main(run, parser)


if __name__ == "__main__":
    main()
