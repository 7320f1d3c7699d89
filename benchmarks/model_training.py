"""Whole models: training steps (forward with loss, backward) per second, against the two public MAC models.

All have the same width, layers, heads, segment, persistent tokens and memory network, with a memory in every layer,
float32. Every model sees ``tokens`` positions. The peers run as their authors set them by default: the memory chunk is
the segment, gates are shared by the tokens of a segment, and all gradients are taken at the initial weights (their
fastest setting; ``--peer-batch-size 128`` makes them move the weights every segment). Ours has one gate per token and
moves the weights every chunk; MAG and MAL attend to a window as long as the segment.
Run ``python benchmarks/model_training.py --help``; benchmarks/README.md has the set-up.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import harness
from harness import Contestant, Step, timed

TOLERANCE = 1e-3
VARIANTS = ("MAC", "MAG", "MAL", "LMM")
DEFAULT = ("mac", "mag", "mal", "lmm", "titans-pytorch", "titans-miras")
HEROES = ("mac", "mag")


def contestants(options: argparse.Namespace) -> list[Contestant]:
    """Everybody who can take part."""
    ours = [
        Contestant(variant.lower(), f"titans {variant}", {"kind": "titans", "variant": variant}, checked=True)
        for variant in VARIANTS
    ]
    return [
        *ours,
        Contestant("titans-pytorch", "titans-pytorch MAC", {"kind": "titans-pytorch"}, options.titans_pytorch_python),
        Contestant("titans-miras", "python-titans-miras MAC", {"kind": "titans-miras"}, options.titans_miras_python),
    ]


def build(settings: dict) -> tuple[Step, dict]:
    """Worker: prepare one contestant."""
    import torch

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model, loss, info = BUILDERS[settings["kind"]](settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4) if settings["optimizer"] == "adamw" else None

    def work() -> None:
        loss().backward()
        if optimizer is not None:
            optimizer.step()

    parameters = sum(p.numel() for p in model.parameters())
    info = {"torch": torch.__version__, "threads": torch.get_num_threads(), "parameters": parameters, **info}
    return timed(lambda: model.zero_grad(set_to_none=True), work), info


def make_model(settings: dict):
    """Our model, as it comes."""
    import torch

    import titans

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    config = titans.TitansConfig(
        variant=settings["variant"],
        vocab_size=settings["vocabulary"],
        d_model=settings["width"],
        n_layers=settings["layers"],
        n_heads=settings["heads"],
        mem_heads=settings["heads"],
        mem_layers=2,
        d_hidden=settings["expansion"] * settings["width"],
        n_persistent=settings["persistent"],
        segment_len=settings["segment"],
        window=settings["segment"],
        chunk_size=settings["chunk"],
    )
    return titans.build_model(config)


def check(settings: dict) -> dict:
    """Worker: logits of our model against those with the memory in the token-by-token reference engine."""
    import ours
    import torch

    model = make_model(settings)
    ids = torch.randint(settings["vocabulary"], (settings["batch"], settings["segment"] + settings["chunk"] // 2))
    return ours.check_against_reference(model, lambda: (model(ids).logits.detach(),), TOLERANCE, graph=False)


def build_titans(settings: dict):
    """Our model."""
    import ours
    import torch

    model = make_model(settings)
    ids = torch.randint(settings["vocabulary"], (settings["batch"], settings["tokens"]))
    return model, lambda: model(ids, labels=ids).loss, {"versions": ours.package_versions()}


def training_ids(settings: dict):
    """The peers cut the last token off for their labels: one more gives them as many positions as ours."""
    import torch

    return torch.randint(settings["vocabulary"], (settings["batch"], settings["tokens"] + 1))


def build_titans_pytorch(settings: dict):
    """titans-pytorch's MemoryAsContextTransformer, memory in every layer (its default)."""
    from titans_pytorch import MemoryAsContextTransformer

    head = settings["width"] // settings["heads"]
    model = MemoryAsContextTransformer(
        num_tokens=settings["vocabulary"],
        dim=settings["width"],
        depth=settings["layers"],
        heads=settings["heads"],
        dim_head=head,
        segment_len=settings["segment"],
        num_persist_mem_tokens=settings["persistent"],
        neural_memory_batch_size=settings["peer_batch_size"],
        neural_memory_kwargs={
            "dim_head": head,
            "heads": settings["heads"],
            "momentum": True,
            "default_model_kwargs": {"depth": 2, "expansion_factor": float(settings["expansion"])},
        },
    )
    ids = training_ids(settings)
    info = {"versions": {"titans-pytorch": version("titans-pytorch")}}
    return model, lambda: model(ids, return_loss=True), info


def build_titans_miras(settings: dict):
    """python-titans-miras' MACTransformer, memory in every layer (its default)."""
    from titans_miras import MACTransformer, MemoryMLP, NeuralMemoryConfig, TransformerConfig

    head = settings["width"] // settings["heads"]
    config = TransformerConfig(
        num_tokens=settings["vocabulary"],
        dim=settings["width"],
        depth=settings["layers"],
        heads=settings["heads"],
        dim_head=head,
        segment_len=settings["segment"],
        num_persist_mem_tokens=settings["persistent"],
        neural_mem=NeuralMemoryConfig(
            dim=settings["width"], heads=settings["heads"], dim_head=head, batch_size=settings["peer_batch_size"]
        ),
    )
    # Its configuration of the memory network is not passed on to the layers; a network handed over is.
    memory = MemoryMLP(head, depth=2, expansion_factor=float(settings["expansion"]))
    model = MACTransformer(config=config, neural_memory_model=memory)
    ids = training_ids(settings)
    info = {"versions": {"python-titans-miras": version("python-titans-miras")}}
    return model, lambda: model(ids, return_loss=True), info


BUILDERS = {"titans": build_titans, "titans-pytorch": build_titans_pytorch, "titans-miras": build_titans_miras}


def run(options: argparse.Namespace) -> None:
    """Driver."""
    if options.worker:
        return harness.serve(build, check)
    chosen = harness.choose(contestants(options), options.contestants, DEFAULT)
    names = ("width", "layers", "heads", "expansion", "segment", "chunk", "persistent", "vocabulary", "tokens", "batch")
    common = {name: getattr(options, name) for name in (*names, "optimizer", "peer_batch_size", "threads")}
    results = harness.race(chosen, Path(__file__), common, options.batch * options.tokens, options)
    print(f"Training step, float32: {', '.join(f'{k} {v}' for k, v in common.items())}\n")
    print(harness.race_table(results, HEROES))
    harness.save(options.output, {"settings": common, "contestants": harness.race_record(results, HEROES)})


def parser() -> argparse.ArgumentParser:
    """Options."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--width", type=int, default=256)
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--heads", type=int, default=4)
    result.add_argument("--expansion", type=int, default=4, help="of the memory network (default: %(default)s)")
    result.add_argument("--segment", type=int, default=128, help="attention block or window (default: %(default)s)")
    result.add_argument("--chunk", type=int, default=64, help="memory chunk of ours (default: %(default)s)")
    result.add_argument("--persistent", type=int, default=4, help="persistent tokens (default: %(default)s)")
    result.add_argument("--vocabulary", type=int, default=256)
    result.add_argument("--tokens", type=int, default=1024, help="T (default: %(default)s)")
    result.add_argument("--batch", type=int, default=2)
    result.add_argument("--optimizer", choices=("none", "adamw"), default="none", help="default: %(default)s")
    result.add_argument(
        "--peer-batch-size", type=int, metavar="N", help="tokens after which the peers move their weights"
    )
    harness.add_race_options(result, rounds=10, warmup=3)
    result.add_argument("--titans-miras-python", default="", metavar="PATH", help="python with python-titans-miras")
    return result


if __name__ == "__main__":
    harness.main(run, parser())
