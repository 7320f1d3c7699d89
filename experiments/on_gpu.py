"""What one GPU can do in minutes: the fair field at equal wall time, and models that find needles.

A step of these models is thousands of short kernels, so it is captured once as a CUDA graph and replayed::

    python -m experiments.on_gpu field --row mag --seconds 80 --output runs/gpu
    python -m experiments.on_gpu needles --seconds 420 --output runs/gpu --name finder --lengths 448,1024 \
        --set d_model=128 --set n_layers=2

``field`` trains one row on text and measures it as experiments/evidence.py does. ``needles`` trains on questions about
texts (configs/needles.yaml), each length with as many rows as keep the tokens of a step, and counts answers that are
right at lengths far beyond. The learning rate follows the clock. Without a GPU the same code runs, eagerly.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.evidence import FIELD, bits_by_position, read_long
from experiments.framework.recall import device
from experiments.framework.scales import match_parameters, parameters
from experiments.framework.text import validation_streams
from experiments.lasting import by_bucket
from titans import TitansConfig, TitansModel, build_model, load_model
from titans.data import ByteTokenizer, TokenDocuments, load_documents
from titans.evaluation import TaskRows
from titans.layers.gates import MemoryGates
from titans.models import save_model
from titans.training import TrainConfig, build_optimizer
from titans.training.config import set_field

TASKS = {"niah_single_1": 2, "niah_single_2": 4, "niah_single_3": 3, "babilong_qa1": 4}
MATRIX: dict[str, Any] = {"mem_layers": 1, "mem_heads": 1, "mem_head_dim": 256}
TEXT: dict[str, Any] = {"vocab_size": 256, "n_persistent": 4, "chunk_size": 16, "segment_len": 64, "window": 64}
WARMUP, LAST_RATE = 100, 0.02
Batches = Iterator[tuple[Tensor, Tensor]]


class Steps:
    """Training steps of one shape of batch: ids and labels in, loss out.

    Args:
        write_cost: nats that a token costs which is written with full strength, on top of the answers; a scalar tensor,
            which may be filled between steps.
    """

    def __init__(self, model: TitansModel, optimizer: torch.optim.Optimizer, write_cost: Tensor):
        self.model, self.optimizer, self.write_cost = model, optimizer, write_cost
        self.strengths: list[Tensor] = []
        for gates in (m for m in model.modules() if isinstance(m, MemoryGates)):
            gates.register_forward_hook(self._seen)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shape: torch.Size | None = None

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        if device().type == "cpu":
            return self._step(ids, labels)
        if self.shape != ids.shape:
            self._capture(ids, labels)
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        assert self.graph is not None
        self.graph.replay()
        return self.loss

    def _seen(self, module: nn.Module, given: Any, found: Any) -> None:
        if torch.is_grad_enabled():
            self.strengths.append(found[0].theta / module.theta_max)  # type: ignore[operator]

    def _step(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.strengths.clear()
        loss = self.model(ids, labels=labels).loss
        cost = torch.stack([x.mean() for x in self.strengths]).sum() * self.write_cost if self.strengths else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        (loss + cost).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, ids: Tensor, labels: Tensor) -> None:
        self.graph = None
        torch.cuda.empty_cache()
        self.shape, self.ids, self.labels = ids.shape, ids.clone(), labels.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(self.ids, self.labels)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread pins batches meanwhile
            self.loss = self._step(self.ids, self.labels)
        self.graph = graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("field", "needles"))
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", help="of the record; the row's")
    parser.add_argument("--row", help="field: a row of experiments/evidence.py", default="mag")
    parser.add_argument("--length", type=int, default=2048, help="field: of a window")
    parser.add_argument("--batch", type=int, default=32, help="field: windows a step")
    parser.add_argument("--steps", type=int, default=10**9, help="field: at most")
    parser.add_argument("--lengths", default="448,1024", help="needles: of the rows, one after the other")
    parser.add_argument("--shares", default="0.15,0.85", help="needles: of the time that each length takes")
    parser.add_argument("--tokens", type=int, default=65536, help="needles: of a step")
    parser.add_argument("--measured", default="1024,4096,16384", help="needles: lengths at which answers are counted")
    parser.add_argument("--samples", type=int, default=64, help="needles: texts per task and length")
    parser.add_argument("--text", default="essays", help="needles: what they are counted in")
    parser.add_argument("--write-cost", type=float, default=0.0)
    parser.add_argument("--init", type=Path, help="needles: a model to go on from")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], help="a field of the model")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    record = field(args) if args.what == "field" else needles(args)
    record |= {"arguments": {k: str(v) for k, v in vars(args).items()}, "torch": torch.__version__}
    record["device"] = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
    (args.output / f"{args.name or args.row}.json").write_text(json.dumps(record, indent=1))


def train(
    args: argparse.Namespace,
    model: TitansModel,
    batches: Callable[[float], tuple[Tensor, Tensor]],
    look: Callable[[int, float], None],
) -> dict[str, Any]:
    """Steps until the time is up; ``batches`` takes the share of it that is gone, ``look`` comes about five times."""
    at = device()
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in build_optimizer(model).param_groups]
    on_gpu = at.type == "cuda"
    lr, write_cost = torch.tensor(args.lr, device=at), torch.zeros((), device=at)
    options = {"fused": True, "capturable": True} if on_gpu else {}
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), **options)
    steps = Steps(model, optimizer, write_cost)
    done, tokens, losses, spent, next_look = 0, 0, [], 0.0, 0.1
    begun = time.monotonic()
    while True:
        share = max(spent / args.seconds, done / args.steps)
        if share >= 1:
            break
        warm = min(1.0, (done + 1) / WARMUP)
        lr.fill_(args.lr * warm * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2))
        # From the start it would close the gates before anything is gained by writing.
        write_cost.fill_(args.write_cost * min(1.0, max(0.0, share - 0.2) / 0.2))
        ids, labels = batches(share)
        loss = steps(ids, labels)
        done, tokens = done + 1, tokens + ids.numel()
        if done % 20 == 0 or not losses or not on_gpu:
            losses.append((done, round(loss.item(), 4)))  # waits, so that the clock is true
            if not math.isfinite(losses[-1][1]):
                raise FloatingPointError(f"step {done}: the loss is {losses[-1][1]}")
        spent = time.monotonic() - begun
        if share >= next_look:
            paused = time.monotonic()
            print(f"{args.name or args.row}: step {done}, {spent:.0f} s, loss {losses[-1][1]}", flush=True)
            look(done, share)
            next_look += 0.2
            begun += time.monotonic() - paused  # a look is not training
    found = {"steps": done, "tokens": tokens, "seconds": spent, "losses": losses[:: max(1, len(losses) // 400)]}
    print(f"{args.name or args.row}: {done} steps, {tokens / spent:,.0f} tokens/s, loss {losses[-1][1]}", flush=True)
    return found


def field(args: argparse.Namespace) -> dict[str, Any]:
    """One row of the field: train on text, measure as experiments/evidence.py does."""
    size: dict[str, Any] = {"d_model": 384, "n_layers": 4, **TEXT}
    for change in args.set:
        set_field(size, change)
    like = TitansConfig(variant="MAG", **size, **MATRIX)
    fields = FIELD[args.row]
    memory = MATRIX if fields["variant"] in ("MAG", "MAC", "MAL", "LMM") and "mem_layers" not in fields else {}
    config = match_parameters(TitansConfig(**{**size, **memory, **fields}), parameters(like))
    model = build_model(config).to(device())
    data = TrainConfig.parse({"model": {"vocab_size": 256}, "data": {"source": "stdlib", "length": args.length}}).data
    documents = TokenDocuments.from_texts(load_documents("stdlib", "train"), ByteTokenizer())
    tokens = torch.as_tensor(documents.tokens).to(device(), torch.uint8)
    generator = torch.Generator(device()).manual_seed(args.seed)
    offsets = torch.arange(args.length, device=device())

    def batches(share: float) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - args.length, (args.batch, 1), generator=generator, device=device())
        ids = tokens[starts + offsets].long()
        return ids, ids

    told = train(args, model, batches, lambda step, share: None)
    told |= {"parameters": parameters(config), "config": config.model_dump(mode="json")}
    ids, _ = validation_streams(data, args.length, 48, ByteTokenizer())
    for mode in ("on", "reset", "off") if config.has_memory else ("on",):
        bits = bits_by_position(model, ids, mode)
        told[mode] = by_bucket(bits, torch.arange(1, len(bits) + 1))
        told[f"{mode} second half"] = bits[args.length // 2 - 1 :].mean().item()
    long, _ = validation_streams(data, args.length * 16, 6, ByteTokenizer())
    told["long"] = read_long(model, long, args.length)
    short = {k: round(v, 3) for k, v in told.items() if k.endswith("second half")}
    print(args.row, short, {k: round(v["beyond"], 3) for k, v in told["long"].items()}, flush=True)
    return told


def needles(args: argparse.Namespace) -> dict[str, Any]:
    """Train on questions about texts of growing length, count right answers far beyond."""
    fields: dict[str, Any] = {"variant": "MAG", "d_model": 128, "n_layers": 2, "use_decay": False, **TEXT, **MATRIX}
    for change in args.set:
        set_field(fields, change)
    config = TitansConfig(**fields)
    model = (load_model(args.init) if args.init else build_model(config)).to(device())
    print(f"{args.name}: {parameters(config):,} parameters", flush=True)
    lengths = [int(x) for x in args.lengths.split(",")]
    ends = [sum(float(x) for x in args.shares.split(",")[: i + 1]) for i in range(len(lengths))]
    rows: dict[int, Batches] = {}

    def batches(share: float) -> tuple[Tensor, Tensor]:
        stage = next((i for i, end in enumerate(ends) if share < end), len(ends) - 1)
        if stage not in rows:
            rows.clear()
            rows[stage] = task_batches(lengths[stage], args)
        return next(rows[stage])

    counted: list[dict[str, Any]] = []

    def look(step: int, share: float) -> None:
        counted.append({"step": step, **count(model, [max(lengths)], 16, args.text)})
        print(f"{args.name}: {counted[-1]}", flush=True)
        save(model, args)

    told = train(args, model, batches, look)
    save(model, args)
    told |= {"parameters": parameters(config), "config": config.model_dump(mode="json"), "counted": counted}
    told["right"] = count(model, [int(x) for x in args.measured.split(",")], args.samples, args.text)
    print(f"{args.name}: {told['right']}", flush=True)
    return told


def task_batches(length: int, args: argparse.Namespace) -> Batches:
    """Batches of rows of so many tokens without end."""
    questions = 2 if length < 1024 else 4 if length < 4096 else 8
    rows = TaskRows(TASKS, ByteTokenizer(), length, 10**8, args.seed * 100_000 + length, questions=questions)
    loader = DataLoader(
        rows,
        max(1, args.tokens // length),
        num_workers=args.workers,
        pin_memory=device().type == "cuda",
        prefetch_factor=6 if args.workers else None,
    )
    for batch in loader:
        yield batch["input_ids"].to(device(), non_blocking=True), batch["labels"].to(device(), non_blocking=True)


@torch.no_grad()
def count(model: TitansModel, lengths: list[int], samples: int, text: str) -> dict[str, float]:
    """Percent of texts whose one answer has the highest logit at each of its bytes, by task and length."""
    tokenizer, found = ByteTokenizer(), {}
    model.eval()
    for name in TASKS:
        for length in lengths:
            rows = TaskRows({name: 1.0}, tokenizer, length, samples, 1, text=text, split="validation")
            right = 0
            for start in range(0, samples, max(1, 2**18 // length)):
                items = [rows[i] for i in range(start, min(samples, start + max(1, 2**18 // length)))]
                ids = torch.stack([item["input_ids"] for item in items]).to(device())
                labels = torch.stack([item["labels"] for item in items]).to(device())
                said = model(ids).logits[:, :-1].argmax(-1)
                asked = labels[:, 1:]
                ignored = (asked == -100) | (asked == tokenizer.separator_id)
                right += int(((said == asked) | ignored).all(1).sum())
            found[f"{name} {length}"] = round(100 * right / samples, 1)
    model.train()
    return found


def save(model: TitansModel, args: argparse.Namespace) -> None:
    """The model's folder as one file, so that it travels."""
    folder = args.output / f"{args.name}-model"
    save_model(model, folder)
    with tarfile.open(args.output / f"{args.name}.tar", "w") as archive:
        archive.add(folder, arcname=args.name)


if __name__ == "__main__":
    main()
