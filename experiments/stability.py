"""Does every rule stay finite and bounded?

(a) The gradient norm of untrained language models on text, and how far float32 parts from float64 over 2,000 tokens.
(b) One memory layer reads random tokens, and a tenth as many times the same token, in float32. (c) A small LMM trains
under bfloat16 autocast on the default corpus; a spike is a loss above twice the median of the 20 steps before it.
``titans experiment experiments/stability.py --scale small --threads 1``
"""

import statistics
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from experiments.framework import Column, Experiment, Figures, Workplace
from titans import MirasConfig, NeuralMemory, TitansConfig, build_model
from titans.data import TokenDocuments, WindowDataset, load_documents, load_tokenizer
from titans.miras import Muon
from titans.miras.config import PRESETS
from titans.training import build_optimizer, get_cosine_schedule_with_warmup

PIECE, BATCH = 2000, 4
TINY = {"tokens": 20_000, "steps": 30}


class Rule(BaseModel):
    """A rule, how many random tokens it reads, and for how many steps it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: MirasConfig
    tokens: int = 200_000
    steps: int = 300


def arms(scale: str) -> dict[str, Rule]:
    """The presets, and Muon."""
    rules = {name: getattr(MirasConfig, name)() for name in PRESETS}
    size = TINY if scale == "tiny" else {}
    return {name: Rule(rule=rule, **size) for name, rule in {**rules, "muon": MirasConfig(algorithm=Muon())}.items()}


def unit(settings: Rule, seed: int, place: Workplace) -> Figures:
    """All parts; a stream that a memory could not read to its end has no figures, its record says where it stopped."""
    found = {f"untrained@{name}": norm for name, norm in untrained(settings.rule, seed).items()}
    found["precision"] = precision(settings.rule, seed)
    for kind, tokens in (("random", settings.tokens), ("constant", settings.tokens // 10)):
        place.raw[kind] = told = read(settings.rule, seed, tokens, kind == "constant")
        if told["stopped"] is None:
            found |= {f"{name}@{kind}": told["at"][-1][name] for name in ("output", "accumulated")}
        place.say(f"  {kind}: {told['stopped'] or 'read to the end'}")
    losses, norms = train(settings.rule, settings.steps, seed)
    place.raw.update(losses=losses, gradient_norms=norms)
    spike = max(losses[i] / statistics.median(losses[i - 20 : i]) for i in range(20, len(losses)))
    return {**found, "final": statistics.mean(losses[-20:]), "spike": spike, "norm": max(norms[20:])}


def untrained(rule: MirasConfig, seed: int) -> dict[str, float]:
    """Outer gradient norm of models as they start, on 4 rows of 256 bytes of validation text."""
    documents = TokenDocuments.from_texts(load_documents("stdlib", "validation")[:20], load_tokenizer("bytes"))
    ids = torch.tensor(documents.tokens[:1024].astype("int64")).view(4, 256)
    found = {}
    for variant in ("LMM", "MAC"):
        for chunk in (16, 64):
            torch.manual_seed(seed)
            sizes: dict[str, Any] = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "segment_len": 64}
            model = build_model(TitansConfig(variant=variant, chunk_size=chunk, miras=rule, **sizes))
            model(ids, labels=ids).loss.backward()
            norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            found[f"{variant}, C = {chunk}"] = float(norms.norm())
    return found


@torch.no_grad()
def precision(rule: MirasConfig, seed: int, tokens: int = 2000) -> float:
    """Median relative error of a float32 layer against its float64 twin, over the last 100 of 2,000 random tokens."""
    torch.manual_seed(seed)
    layer = NeuralMemory(32, n_heads=1, chunk_size=16, miras=rule)
    x = torch.randn(1, tokens, 32)
    single, double = layer(x)[0, -100:].double(), layer.double()(x.double())[0, -100:]
    return float(((single - double).norm(dim=-1) / double.norm(dim=-1)).median())


@torch.no_grad()
def read(rule: MirasConfig, seed: int, tokens: int, constant: bool) -> dict[str, Any]:
    """Largest output and weight at every tenth of a stream, or where the memory stopped with an error."""
    torch.manual_seed(seed)
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


def train(rule: MirasConfig, steps: int, seed: int) -> tuple[list[float], list[float]]:
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
    return losses, norms


EXPERIMENT = Experiment(
    name="stability",
    purpose="Is every rule finite and bounded: gradient norms, float32, long and constant streams, bfloat16 training?",
    arms=arms,
    unit=unit,
    columns={
        "untrained": Column("gradient norm untrained", ".2f", "model"),
        "precision": Column("float32 against float64", ".1e", drawn=False),
        "output": Column("largest output", ".2f", "stream"),
        "accumulated": Column("largest entry of A", ".2g", "stream"),
        "final": Column("bfloat16: mean of the last 20 losses", ".2f"),
        "spike": Column("largest loss / median of 20 before", ".2f"),
        "norm": Column("largest gradient norm after step 20", ".1f"),
    },
    note="The constant stream is a tenth as long as the random one. Losses are in nats per byte.",
)
