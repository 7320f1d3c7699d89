"""Memory layer alone: forward + backward (to input and parameters) per second, against titans-pytorch and plain GEMMs.

Every contestant has the same memory: an MLP of depth 2 and expansion 4 per head, momentum and forgetting on, float32.
Ours has one gate per token and takes gradients at the start of each chunk. titans-pytorch is shown three times:

- gates per token, weights moved every chunk: the same rule as ours;
- gates shared by the tokens of a chunk, weights moved every chunk: coarser gates, the same chunks;
- gates shared by the tokens of a chunk, all gradients at the initial weights: its default, and its fastest.

The GEMM limit runs only the matrix products that the memory cannot do without, on the same threads.
Ours is what comes without any setting, and what comes where there is no compiler. Before it is timed, its output and
all its gradients must equal those of the token-by-token reference engine on two and a half chunks.
Run ``python benchmarks/memory_layer.py --help``; benchmarks/README.md has the set-up.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import harness
from harness import Contestant, Step, timed

TOLERANCE = 1e-4
DEFAULT = ("titans", "titans-fused", "tp-token", "tp-chunk", "tp-chunk-fixed", "gemm", "gemm-projections")


def contestants(options: argparse.Namespace) -> list[Contestant]:
    """Everybody who can take part."""
    chunk = options.chunk
    peer, peer_python = {"kind": "titans-pytorch"}, options.titans_pytorch_python
    return [
        Contestant("titans", "titans", {"kind": "titans", "engine": "auto"}, checked=True),
        Contestant("titans-fused", "titans without a compiler", {"kind": "titans", "engine": "fused"}, checked=True),
        Contestant("tp-token", "titans-pytorch, gates per token", {**peer, "chunk_size": 1, "batch_size": chunk},
                   peer_python, slow=True),
        Contestant("tp-chunk", f"titans-pytorch, gates per {chunk}", {**peer, "chunk_size": chunk, "batch_size": chunk},
                   peer_python),
        Contestant("tp-chunk-fixed", f"titans-pytorch, gates per {chunk}, gradients at initial weights",
                   {**peer, "chunk_size": chunk, "batch_size": None}, peer_python),
        Contestant("gemm", "GEMM limit of the memory", {"kind": "gemm", "projections": False}),
        Contestant(
            "gemm-projections", "GEMM limit with the layer's projections", {"kind": "gemm", "projections": True}
        ),
    ]  # fmt: skip


def build(settings: dict) -> tuple[Step, dict]:
    """Worker: prepare one contestant."""
    import torch

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    step, info = BUILDERS[settings["kind"]](settings)
    return step, {"torch": torch.__version__, "threads": torch.get_num_threads(), **info}


def training_step(layer, call, settings: dict) -> Step:
    """Forward and backward of ``call(x)`` for one fixed input and cotangent."""
    import torch

    x = torch.randn(settings["batch"], settings["tokens"], settings["width"], requires_grad=True)
    cotangent = torch.randn_like(x)

    def clear() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return timed(clear, lambda: call(x).backward(cotangent))


def make_layer(settings: dict):
    """Our layer, in its engine."""
    import torch

    from titans import NeuralMemory

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    layer = NeuralMemory(
        d_model=settings["width"],
        n_layers=2,
        n_heads=settings["heads"],
        chunk_size=settings["chunk"],
        d_hidden=settings["expansion"] * settings["width"],
    )
    layer.engine = settings["engine"]
    return layer


def check(settings: dict) -> dict:
    """Worker: output and all gradients of our layer against the token-by-token reference engine."""
    return check_layer(make_layer(settings), settings)


def check_layer(layer, settings: dict) -> dict:
    """Two and a half chunks through ``layer`` in its engine and in the reference."""
    import ours
    import torch

    x = torch.randn(settings["batch"], 5 * settings["chunk"] // 2, settings["width"], requires_grad=True)
    cotangent = torch.randn_like(x)

    def evaluate() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)

    return ours.check_against_reference(layer, evaluate, TOLERANCE)


def build_titans(settings: dict) -> tuple[Step, dict]:
    """Our layer."""
    import ours

    layer = make_layer(settings)
    memory = sum(p.numel() for p in layer.initial_weights)
    return training_step(layer, layer, settings), {"versions": ours.package_versions(), "memory_weights": memory}


def build_titans_pytorch(settings: dict) -> tuple[Step, dict]:
    """titans-pytorch's NeuralMemory with the same memory network."""
    from titans_pytorch import NeuralMemory

    layer = NeuralMemory(
        dim=settings["width"],
        heads=settings["heads"],
        dim_head=settings["width"] // settings["heads"],
        chunk_size=settings["chunk_size"],
        batch_size=settings["batch_size"],
        momentum=True,
        default_model_kwargs={"depth": 2, "expansion_factor": float(settings["expansion"])},
    )
    memory = sum(p.numel() for p in layer.memory_model_parameters if p.dim() == 3)
    info = {"versions": {"titans-pytorch": version("titans-pytorch")}, "memory_weights": memory}
    return training_step(layer, lambda x: layer(x)[0], settings), info


def necessary_products(settings: dict) -> list[tuple[int, int, int, int, int]]:
    """(how often, rows, m, k, n) of the forward products [rows, m, k] @ [rows, k, n] (math.md §8).

    Per map and chunk: key pass, back-projection (the first map needs none), reads through W and S, both state updates,
    and the in-chunk part a·b and its product with the errors.
    """
    rows, chunk = settings["batch"] * settings["heads"], settings["chunk"]
    chunks = -(-settings["tokens"] // chunk)
    head = settings["width"] // settings["heads"]
    hidden = settings["expansion"] * head
    products = []
    for first, (d_in, d_out) in ((True, (head, hidden)), (False, (hidden, head))):
        products += [(3 * chunks, rows, chunk, d_in, d_out), (2 * chunks, rows, d_in, chunk, d_out)]
        products += [(chunks, rows, chunk, d_in, chunk), (chunks, rows, chunk, chunk, d_out)]
        if not first:
            products.append((chunks, rows, chunk, d_out, d_in))
    if settings["projections"]:
        # query, key, value, output gate and output
        products.append((5, 1, settings["batch"] * settings["tokens"], settings["width"], settings["width"]))
    return products


def build_gemm(settings: dict) -> tuple[Step, dict]:
    """Each necessary product once forward, and the two products of its backward, into memory that is there already."""
    import torch

    products = necessary_products(settings)
    work = []
    for times, rows, m, k, n in products:
        a, b, c = torch.randn(rows, m, k), torch.randn(rows, k, n), torch.randn(rows, m, n)
        work.append((times, a, b, c, torch.empty_like(a), torch.empty_like(b), torch.empty_like(c)))

    def step() -> float:
        start = time.perf_counter()
        for times, a, b, c, grad_a, grad_b, out in work:
            for _ in range(times):
                torch.bmm(a, b, out=out)
            for _ in range(times):
                torch.bmm(c, b.transpose(1, 2), out=grad_a)
                torch.bmm(a.transpose(1, 2), c, out=grad_b)
        return time.perf_counter() - start

    flops = 3 * sum(2 * times * rows * m * k * n for times, rows, m, k, n in products)
    return step, {"versions": {}, "flops_per_step": flops}


BUILDERS = {"titans": build_titans, "titans-pytorch": build_titans_pytorch, "gemm": build_gemm}


def run(options: argparse.Namespace) -> None:
    """Driver."""
    if options.worker:
        return harness.serve(build, check)
    chosen = harness.choose(contestants(options), options.contestants, DEFAULT)
    names = ("width", "heads", "chunk", "expansion", "tokens", "batch", "threads")
    common = {name: getattr(options, name) for name in names}
    results = harness.race(chosen, Path(__file__), common, options.batch * options.tokens, options)
    heroes = ("titans", "titans-fused")
    print(f"Memory layer, forward + backward, float32: {', '.join(f'{k} {v}' for k, v in common.items())}\n")
    print(harness.race_table(results, heroes))
    print()
    for line in fractions(results):
        print(line)
    harness.save(options.output, {"settings": common, "contestants": harness.race_record(results, heroes)})


def fractions(results: list[harness.Result]) -> list[str]:
    """Our speed as a share of the GEMM limits."""
    lines = []
    for limit in (r for r in results if r.contestant.settings["kind"] == "gemm"):
        rate = limit.info["flops_per_step"] / (limit.tokens / harness.spread(limit.rates)["median"]) / 1e9
        lines.append(f"{limit.contestant.title}: {rate:.0f} GFLOP/s")
        for ours in (r for r in results if r.contestant.settings["kind"] == "titans"):
            share = harness.spread(harness.ratios(ours, limit))
            lines.append(
                f"  {ours.contestant.title}: {share['median']:.2f} of it ({share['min']:.2f} to {share['max']:.2f})"
            )
    return lines


def parser(purpose: str) -> argparse.ArgumentParser:
    """Options of a race of memory layers."""
    result = argparse.ArgumentParser(description=purpose.splitlines()[0])
    result.add_argument("--width", type=int, default=256)
    result.add_argument("--heads", type=int, default=4)
    result.add_argument("--chunk", type=int, default=64)
    result.add_argument("--expansion", type=int, default=4)
    result.add_argument("--tokens", type=int, default=1024, help="T (default: %(default)s)")
    result.add_argument("--batch", type=int, default=2)
    harness.add_race_options(result, rounds=15, warmup=4)
    return result


if __name__ == "__main__":
    harness.main(run, parser(__doc__))
