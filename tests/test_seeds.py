"""Programs that users of the earlier packages know, as their documentation prints them (indentation restored)."""

from __future__ import annotations

import pytest
import torch

from titans import TitansConfig

QUICK_START = """
import torch
from titans import TitansMAC, TitansMAG, TitansMAL, TitansLMM
from titans.utils import TitansConfig, build_model, count_parameters
# ── Build from config ──────────────────────────────────────────────────
cfg = TitansConfig.small(variant="MAC") # ~170 M params
cfg.vocab_size = 32_000
model = build_model(cfg)
print(f"Parameters: {count_parameters(model):,}")
# ── Forward pass ───────────────────────────────────────────────────────
input_ids = torch.randint(0, 32_000, (2, 512))
labels = input_ids.clone()
out = model(input_ids, labels=labels)
print(out["logits"].shape) # (2, 512, 32000)
print(out["loss"].item())
# ── Generation ─────────────────────────────────────────────────────────
prompt = torch.randint(0, 32_000, (1, 8))
generated = model.generate(prompt, max_new_tokens=50, top_k=50)
"""

VARIANTS = """
from titans import TitansMAC, TitansMAG, TitansMAL, TitansLMM
VOCAB = 32_000
D = 512
models = {
    "LMM": TitansLMM(VOCAB, d_model=D, n_layers=12, mem_layers=2),
    "MAC": TitansMAC(VOCAB, d_model=D, n_layers=12, mem_layers=2, chunk_size=128),
    "MAG": TitansMAG(VOCAB, d_model=D, n_layers=12, mem_layers=2, window=512),
    "MAL": TitansMAL(VOCAB, d_model=D, n_layers=12, mem_layers=2, window=512),
}
"""

PRESETS = """
from titans.utils import TitansConfig, build_model
cfg = TitansConfig.tiny(variant="MAC") # ~30 M — quick experiments
cfg = TitansConfig.small(variant="MAC") # ~170 M — paper Table 1
cfg = TitansConfig.medium(variant="MAC") # ~340 M — paper Table 1
cfg = TitansConfig.large(variant="MAC") # ~760 M — paper Table 1
# JSON save / load
cfg.to_json("config.json")
cfg = TitansConfig.from_json("config.json")
"""

TRAINING = """
import torch
from titans.utils.training import build_optimizer, get_cosine_schedule_with_warmup
optim = build_optimizer(model, lr=4e-4, weight_decay=0.1) # AdamW, no wd on bias/norm
sched = get_cosine_schedule_with_warmup(optim,
    warmup_steps=2000, total_steps=100_000, min_lr_ratio=0.1)
for batch in dataloader:
    out = model(batch["input_ids"], labels=batch["labels"])
    out["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step(); sched.step(); optim.zero_grad()
"""

PATHS = """
from titans.memory import NeuralMemory, PersistentMemory
from titans.models import TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans.ops import causal_attention, memory_scan, parallel_scan, sliding_window_attention
from titans.ops.scan import parallel_scan
from titans.utils import TitansConfig, build_model, count_parameters
from titans.utils.training import build_optimizer, get_cosine_schedule_with_warmup
"""


def run(program: str, **names) -> dict:
    exec(program, names)
    return names


def shrink(monkeypatch, **fields):
    """Let the preset ``small`` mean a model that a test can afford."""
    monkeypatch.setattr(TitansConfig, "small", classmethod(lambda cls, variant="MAC": cls(variant=variant, **fields)))


def check_quick_start(names):
    assert names["out"]["logits"].shape == (2, 512, 32_000)
    assert names["out"]["loss"].isfinite()
    assert names["generated"].shape == (1, 58)


def test_quick_start_and_training_loop_on_a_small_model(monkeypatch):
    shrink(monkeypatch, d_model=32, n_layers=1)
    names = run(QUICK_START)
    check_quick_start(names)
    ids = torch.randint(0, 32_000, (1, 64))
    before = names["model"].norm.weight.clone()
    run(TRAINING, model=names["model"], dataloader=[{"input_ids": ids, "labels": ids}] * 2)
    assert not torch.equal(before, names["model"].norm.weight)


@pytest.mark.slow
def test_quick_start_as_printed():
    check_quick_start(run(QUICK_START))


def test_all_four_variants_as_printed():
    with torch.device("meta"):
        assert sorted(run(VARIANTS)["models"]) == ["LMM", "MAC", "MAG", "MAL"]


@pytest.mark.slow
def test_all_four_variants_as_printed_for_real():
    ids = torch.randint(0, 32_000, (1, 300))
    for model in run(VARIANTS)["models"].values():
        assert model(ids).logits.shape == (1, 300, 32_000)


def test_presets_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(PRESETS)["cfg"] == TitansConfig.large(variant="MAC").explicit()


def test_import_paths():
    run(PATHS)
