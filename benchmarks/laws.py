"""The laws that a memory model must keep, tested on ours and on the public MAC models in the same way.

Causality, independence and reach are tested on the language model (logits), streaming on the memory layer: one call
against two calls with the state handed over, cut at a chunk's end and inside a chunk. Everything in float64.
Run ``python benchmarks/laws.py --help``; benchmarks/README.md has the set-up of the peers.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import harness

EXACT = 1e-9
WIDTH, HEADS, CHUNK, SEGMENT, VOCABULARY, TOKENS = 32, 2, 4, 8, 16, 40
LAWS = {
    "future": "no output depends on a later token",
    "others": "no sample depends on another",
    "reach": "the first token reaches the last output, beyond every window",
    "cut_at_chunk": "memory layer: two calls = one, cut at a chunk's end",
    "cut_inside": "memory layer: two calls = one, cut inside a chunk",
    "mask": "the model's forward takes a padding mask",
}


def build_ours():
    import titans

    sizes = {"d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "mem_heads": HEADS}
    model = titans.TitansMAC(VOCABULARY, **sizes, segment_len=SEGMENT, chunk_size=CHUNK).double()
    layer = titans.NeuralMemory(WIDTH, n_heads=HEADS, chunk_size=CHUNK).double()
    return model, lambda ids: model(ids).logits, lambda x, state: layer(x, state=state, return_state=True)


def build_titans_pytorch():
    from titans_pytorch import MemoryAsContextTransformer, NeuralMemory

    sizes = {"dim": WIDTH, "heads": HEADS, "dim_head": WIDTH // HEADS}
    model = MemoryAsContextTransformer(
        num_tokens=VOCABULARY, depth=2, segment_len=SEGMENT, num_persist_mem_tokens=2, **sizes,
        neural_memory_kwargs={"heads": HEADS, "dim_head": WIDTH // HEADS},
    ).double()  # fmt: skip
    layer = NeuralMemory(**sizes, chunk_size=CHUNK).double()
    return model, model, lambda x, state: layer(x, state=state)


def build_titans_miras():
    from titans_miras import MACTransformer, MemoryMLP, NeuralMemory, NeuralMemoryConfig, TransformerConfig

    sizes = {"dim": WIDTH, "heads": HEADS, "dim_head": WIDTH // HEADS}
    config = TransformerConfig(
        num_tokens=VOCABULARY, depth=2, segment_len=SEGMENT, num_persist_mem_tokens=2, **sizes,
        neural_mem=NeuralMemoryConfig(**sizes),
    )  # fmt: skip
    network = MemoryMLP(WIDTH // HEADS, depth=2, expansion_factor=2.0)
    model = MACTransformer(config=config, neural_memory_model=network).double()
    layer = NeuralMemory(NeuralMemoryConfig(**sizes, chunk_size=CHUNK)).double()
    return model, model, lambda x, state: layer(x, state=state)


BUILDERS = {
    "titans (ours)": build_ours,
    "titans-pytorch": build_titans_pytorch,
    "python-titans-miras": build_titans_miras,
}


def examine(name: str) -> dict[str, str]:
    """Worker: one verdict per law."""
    import torch

    torch.manual_seed(0)
    model, logits, read = BUILDERS[name]()
    with torch.no_grad():
        ids = torch.randint(VOCABULARY, (2, TOKENS))
        before, future, others = logits(ids), 0.0, 0.0
        for row, t in itertools.product((0, 1), range(1, TOKENS)):
            changed = ids.clone()
            changed[row, t] = (changed[row, t] + 1) % VOCABULARY
            difference = (logits(changed) - before).abs()
            future = max(future, difference[row, :t].max().item())
            others = max(others, difference[1 - row].max().item())
        changed = ids.clone()
        changed[0, 0] = (changed[0, 0] + 1) % VOCABULARY
        reach = (logits(changed) - before)[0, -1].abs().max().item()
        x = torch.randn(2, 21, WIDTH).double()
        whole = read(x, None)[0]
        cuts = {name: cut(read, x, whole, at) for name, at in (("cut_at_chunk", 8), ("cut_inside", 7))}
    verdict = {"future": verdict_of(future), "others": verdict_of(others), **cuts}
    verdict["reach"] = "yes" if reach > EXACT else "no"
    takes_mask = {"mask", "attention_mask"} & set(inspect.signature(type(model).forward).parameters)
    return {**verdict, "mask": "yes" if takes_mask else "no"}


def cut(read, x, whole, at: int) -> str:
    """Verdict on two calls against one."""
    import torch

    try:
        first, state = read(x[:, :at], None)
        second, _ = read(x[:, at:], state)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return f"no: {type(error).__name__}"
    return verdict_of((torch.cat((first, second), 1) - whole).abs().max().item())


def verdict_of(difference: float) -> str:
    return "yes" if difference <= EXACT else f"no: differs by {difference:.1e}"


def run(options: argparse.Namespace) -> None:
    """Driver: one process per package, each in its own environment."""
    if options.worker:
        print(json.dumps(examine(options.worker)))
        return
    pythons = {
        "titans (ours)": sys.executable,
        "titans-pytorch": options.titans_pytorch_python,
        "python-titans-miras": options.titans_miras_python,
    }
    found = {name: ask(name, python) for name, python in pythons.items() if python}
    rows = [[text, *(found[name][law] for name in found)] for law, text in LAWS.items()]
    print(harness.table(["", *found], rows))
    harness.save(options.output, {"laws": LAWS, "verdicts": found})


def ask(name: str, python: str) -> dict[str, str]:
    """The verdicts of one package."""
    harness.check_python(harness.Contestant(name, name, {}, python))
    environment = harness.environment_of(python if python != sys.executable else None)
    command = [python, str(Path(__file__)), "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise harness.BenchmarkError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def parser() -> argparse.ArgumentParser:
    """Options."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--titans-pytorch-python", metavar="PATH", help="python with titans-pytorch")
    result.add_argument("--titans-miras-python", metavar="PATH", help="python with python-titans-miras")
    result.add_argument("--output", type=Path, help="also write a JSON file")
    result.add_argument("--worker", help=argparse.SUPPRESS)
    return result


if __name__ == "__main__":
    harness.main(run, parser())
