"""What each MIRAS rule costs: the memory layer under every preset, with gates per head and per channel.

Forward + backward of one layer, all in one run, turn about; ratios are to the titans preset. Run
``python benchmarks/memory_rules.py --help``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
from harness import Contestant, Step
from memory_layer import check_layer, parser, training_step

PRESETS = ("titans", "steady", "yaad", "moneta", "memora", "muon")


def contestants() -> list[Contestant]:
    """The titans preset first: everybody is measured against it."""
    return [
        Contestant(
            f"{preset}{'' if gates == 'head' else '-channel'}", f"{preset}, gates per {gates}",
            {"preset": preset, "gates": gates}, checked=True,
        )
        for gates in ("head", "channel")
        for preset in PRESETS
    ]  # fmt: skip


def make_layer(settings: dict):
    """A layer under one rule."""
    import torch

    from titans import MirasConfig, NeuralMemory

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    preset = settings["preset"]
    rule = MirasConfig(algorithm="muon") if preset == "muon" else getattr(MirasConfig, preset)()
    rule = rule.model_copy(update={"gates": settings["gates"]})
    return NeuralMemory(settings["width"], n_heads=settings["heads"], chunk_size=settings["chunk"], miras=rule)


def check(settings: dict) -> dict:
    """Worker: output and all gradients against the token-by-token reference engine."""
    return check_layer(make_layer(settings), settings)


def build(settings: dict) -> tuple[Step, dict]:
    """Worker: one training step of one layer."""
    import ours
    import torch

    layer = make_layer(settings)
    memory = sum(p.numel() for p in layer.initial_weights)
    info = {"torch": torch.__version__, "threads": torch.get_num_threads(), "memory_weights": memory}
    return training_step(layer, layer, settings), {**info, "versions": ours.package_versions()}


def run(options: argparse.Namespace) -> None:
    """Driver."""
    if options.worker:
        return harness.serve(build, check)
    chosen = harness.choose(contestants(), options.contestants, [c.key for c in contestants()])
    names = ("width", "heads", "chunk", "tokens", "batch", "threads")
    common = {name: getattr(options, name) for name in names}
    results = harness.race(chosen, Path(__file__), common, options.batch * options.tokens, options)
    titans = next(r for r in results if r.contestant.key == "titans")
    rows = []
    for result in results:
        rate = harness.spread(result.rates)
        slower = harness.spread(harness.ratios(titans, result))
        rows.append(
            (
                result.contestant.title,
                f"{rate['median']:,.0f}",
                f"{slower['median']:.2f}x",
                f"{slower['min']:.2f} to {slower['max']:.2f}",
            )
        )
    print(f"Memory layer, forward + backward, float32: {', '.join(f'{k} {v}' for k, v in common.items())}\n")
    print(harness.table(("rule", "tokens/s", "time / titans", "range"), rows))
    harness.save(options.output, {"settings": common, "contestants": harness.race_record(results, ("titans",))})


if __name__ == "__main__":
    harness.main(run, parser(__doc__))
