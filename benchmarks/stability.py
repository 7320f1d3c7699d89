"""Does every rule stay finite and bounded?

(a) The gradient norm of untrained language models on text, and how far float32 parts from float64 over 2,000 tokens.
(b) One memory layer reads 200,000 random tokens, and 20,000 times the same token, in float32. (c) A small LMM trains
under bfloat16 autocast for 300 steps on the default corpus; a spike is a loss above twice the median of the 20 steps
before it.
``python benchmarks/stability.py --output docs/results/raw/stability.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import harness
import torch

from titans import MirasConfig, NeuralMemory, TitansConfig, build_model
from titans.data import TokenDocuments, WindowDataset, load_documents, load_tokenizer
from titans.training import build_optimizer, get_cosine_schedule_with_warmup

RULES = {
    **{name: getattr(MirasConfig, name)() for name in ("titans", "steady", "yaad", "moneta", "memora")},
    "muon": MirasConfig(algorithm="muon"),
}
PIECE, BATCH = 2000, 4


def untrained(rule: MirasConfig) -> dict:
    """Outer gradient norm of models as they start, on 4 rows of 256 bytes of validation text."""
    documents = TokenDocuments.from_texts(load_documents("stdlib", "validation")[:20], load_tokenizer("bytes"))
    ids = torch.tensor(documents.tokens[:1024].astype("int64")).view(4, 256)
    found = {}
    for variant in ("LMM", "MAC"):
        for chunk in (16, 64):
            torch.manual_seed(0)
            sizes = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "segment_len": 64}
            model = build_model(TitansConfig(variant=variant, chunk_size=chunk, miras=rule, **sizes))
            model(ids, labels=ids).loss.backward()
            norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            found[f"{variant}, C = {chunk}"] = float(norms.norm())
    return found


@torch.no_grad()
def read(rule: MirasConfig, tokens: int, constant: bool) -> dict:
    """Largest output and weight at every tenth of a stream, or where the memory stopped with an error."""
    torch.manual_seed(0)
    layer = NeuralMemory(64, chunk_size=64, miras=rule)
    fixed, state, found = torch.randn(1, 1, 64), None, []
    for start in range(0, tokens, PIECE):
        x = fixed.expand(1, PIECE, 64) if constant else torch.randn(1, PIECE, 64)
        try:
            y, state = layer(x, state=state, return_state=True)
        except FloatingPointError as error:
            return {"stopped": f"within {start + PIECE} tokens: {error}", "at": found}
        if (start // PIECE + 1) % max(1, tokens // PIECE // 10) == 0:
            used = max(float(w.abs().max()) for w in state.memory.weights)
            found.append({"tokens": start + PIECE, "output": float(y.abs().max()), "accumulated": used})
    return {"stopped": None, "at": found}


@torch.no_grad()
def precision(rule: MirasConfig, tokens: int = 2000) -> float:
    """Median relative error of a float32 layer against its float64 twin, over the last 100 of 2,000 random tokens."""
    torch.manual_seed(0)
    layer = NeuralMemory(32, n_heads=1, chunk_size=16, miras=rule)
    x = torch.randn(1, tokens, 32)
    single, double = layer(x)[0, -100:].double(), layer.double()(x.double())[0, -100:]
    return float(((single - double).norm(dim=-1) / double.norm(dim=-1)).median())


def train(rule: MirasConfig, steps: int, seed: int) -> dict:
    """Losses and gradient norms of a bfloat16 run."""
    torch.manual_seed(seed)
    config = TitansConfig(variant="LMM", vocab_size=256, d_model=64, n_layers=2, chunk_size=32, miras=rule)
    model = build_model(config)
    optimizer = build_optimizer(model, lr=2e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps=30, total_steps=steps)
    documents = TokenDocuments.from_texts(load_documents("stdlib", "train"), load_tokenizer("bytes"))
    windows = WindowDataset(documents, 128, seed)
    losses, norms = [], []
    for step in range(steps):
        ids = torch.stack([windows[step * BATCH + row]["input_ids"] for row in range(BATCH)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    spikes = [losses[i] / statistics.median(losses[i - 20 : i]) for i in range(20, steps)]
    return {
        "seed": seed,
        "losses": losses,
        "norms": norms,
        "largest_spike": max(spikes),
        "final": statistics.mean(losses[-20:]),
    }


def main(options: argparse.Namespace) -> None:
    """All parts for every rule, written after each."""
    torch.set_num_threads(options.threads)
    rules = {name: RULES[name] for name in options.rules}
    record: dict = {"untrained": {}, "precision": {}, "streams": {}, "bfloat16": {}}
    for name, rule in rules.items():
        record["untrained"][name] = untrained(rule)
        print(
            f"{name}, untrained: {', '.join(f'{k} {v:.3g}' for k, v in record['untrained'][name].items())}", flush=True
        )
        record["precision"][name] = precision(rule)
        print(f"{name}, float32 against float64: {record['precision'][name]:.1g}", flush=True)
    if options.quick:
        harness.save(options.output, record)
        return
    for name, rule in rules.items():
        start = time.perf_counter()
        streams = {"random": read(rule, options.tokens, False), "constant": read(rule, options.tokens // 10, True)}
        record["streams"][name] = streams
        for kind, found in streams.items():
            ends = found["stopped"] or "output {output:.3g}, accumulated weights {accumulated:.3g}".format(
                **found["at"][-1]
            )
            print(f"{name}, {kind}: {ends} ({time.perf_counter() - start:.0f} s)", flush=True)
        harness.save(options.output, record)
    for name, rule in rules.items():
        record["bfloat16"][name] = runs = [train(rule, options.steps, seed) for seed in options.seeds]
        for run in runs:
            print(
                f"{name}, bfloat16, seed {run['seed']}: loss {run['losses'][0]:.2f} to {run['final']:.3f}, "
                f"largest spike {run['largest_spike']:.2f}, largest gradient norm {max(run['norms'][20:]):.2f}",
                flush=True,
            )
        harness.save(options.output, record)


def parser() -> argparse.ArgumentParser:
    """Options."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    result.add_argument("--tokens", type=int, default=200_000, help="random tokens; a tenth of it constant")
    result.add_argument("--steps", type=int, default=300)
    result.add_argument("--seeds", nargs="+", type=int, default=[0])
    result.add_argument("--quick", action="store_true", help="gradient norms and precision alone")
    harness.add_common_options(result)
    return result


if __name__ == "__main__":
    harness.main(main, parser())
