"""What docs/architecture.md says of adding: a retention gate, a variant and a corpus, each one definition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import nn

from helpers import assert_close
from runs import metrics
from titans import NeuralMemory, TitansConfig, build_model, load_model
from titans.cli import main
from titans.data import corpus, load_documents
from titans.data.sources import CORPORA
from titans.layers.attention import AttentionCache
from titans.layers.neural_memory import NeuralMemoryState
from titans.miras import L2, MirasConfig, Momentum, Retention, SphereRetention
from titans.models import ModelState
from titans.models.mixers.parts import PrefixedMemory, make_attention
from titans.models.registry import MIXERS, Mixer
from titans.state import State

ROOT = Path(__file__).parents[1]
TOKENS = 21
SMALL = {
    "vocab_size": 11, "d_model": 12, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "n_persistent": 3, "chunk_size": 4,
    "window": 5,
}  # fmt: skip


class RowCap(Retention):
    """A row of A longer than ``cap`` times its norm in A_0 is scaled back to that when a chunk closes."""

    name = "row_cap"
    replaces = True
    cap: float = Field(default=1.5, gt=0)

    def anchor(self, initial):
        return self.cap * torch.linalg.vector_norm(initial, dim=-1, keepdim=True)

    def project(self, accumulated, anchor):
        found = torch.linalg.vector_norm(accumulated, dim=-1, keepdim=True)
        return accumulated * (anchor / found.clamp_min(1e-12)).clamp(max=1)


@dataclass(frozen=True)
class ParallelState(State):
    """Memory and attention cache of one layer."""

    memory: NeuralMemoryState
    cache: AttentionCache


class ParallelMixer(Mixer):
    """o = SWA(x) + n(M([P‖x])): memory and attention side by side."""

    variants = ("parallel",)

    def __init__(self, config):
        super().__init__()
        self.branch = PrefixedMemory(config)
        self.attention = make_attention(config, config.window)
        self.memory_norm = nn.RMSNorm(config.d_model)

    def forward(self, x, state, rows, store):
        read, memory, _ = self.branch(x, None if state is None else state.memory, rows, store)
        y, cache = self.attention(x, None if state is None else state.cache, rows)
        return y + self.memory_norm(read), ParallelState(memory, cache)


@corpus("manuals")
def manuals(split, data_dir=None):
    """The pages under docs/, the first of them held out."""
    if split == "test":
        raise ValueError("split: manuals has no 'test' split")
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    return pages[:1] if split == "validation" else pages[1:]


@pytest.fixture(params=[0.9, 1.05])  # one that always binds, one that writing runs into
def memory(request):
    torch.manual_seed(0)
    rule = MirasConfig(retention={"name": "row_cap", "cap": request.param})
    return NeuralMemory(12, n_heads=2, chunk_size=4, miras=rule, theta_max=0.5).double()


@pytest.fixture
def parallel():
    torch.manual_seed(0)
    return build_model(TitansConfig(variant="parallel", **SMALL)).double()


def vectors():
    return torch.randn(2, TOKENS, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ids():
    return torch.randint(11, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def half_masked():
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, :5] = mask[0, 9] = False
    return mask


def test_the_gate_caps_rows_and_keeps_the_laws(memory):
    x, mask = vectors(), half_masked()
    whole, state = memory(x, return_state=True)
    first, middle = memory(x[:, :7], return_state=True)
    assert_close(torch.cat((first, memory(x[:, 7:], state=middle)), 1), whole, "split")
    padded = memory(x, mask=mask)
    assert_close(padded[0][mask[0]], memory(x[:1][:, mask[0]])[0], "padded")
    assert_close(padded[1], whole[1], "its neighbour")
    memory.engine = "reference"
    assert_close(memory(x), whole, "reference")
    for now, initial in zip(state.memory.weights, memory.initial_weights, strict=True):
        ratio = now.norm(dim=-1) / initial.norm(dim=-1)
        assert abs(ratio.max() - memory.miras.retention.cap) < 1e-12


def test_the_gate_goes_by_name_in_a_file(tmp_path):
    file = tmp_path / "model.json"
    file.write_text('{"variant": "MAG", "miras": {"retention": {"name": "row_cap", "cap": 2}}}')
    config = TitansConfig.from_json(file)
    assert config.rule.retention == RowCap(cap=2)
    config.to_json(file)
    assert TitansConfig.from_json(file).rule == config.rule


def test_the_variant_trains_saves_and_loads(parallel, tmp_path):
    x, losses = ids(), []
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    for _ in range(2):
        loss = parallel(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parallel.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    parallel.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(x).logits, parallel(x).logits)


@torch.no_grad()
def test_the_variant_keeps_the_laws(parallel, tmp_path):
    x, mask = ids(), half_masked()
    whole, state, pieces = parallel(x), None, []
    for start, stop in ((0, 1), (1, 9), (9, TOKENS)):
        out = parallel(x[:, start:stop], state=state)
        out.state.save(tmp_path / "state.safetensors")
        state = ModelState.load(tmp_path / "state.safetensors")
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole.logits, "streamed, the state through a file")
    padded = parallel(x, attention_mask=mask).logits
    assert_close(padded[0][mask[0]], parallel(x[:1][:, mask[0]]).logits[0], "padded")
    documents = torch.tensor([[0] * 9 + [1] * 2 + [2] * 10, [0] * TOKENS])
    packed = parallel(x, document_ids=documents).logits
    alone = [parallel(part).logits for part in x[:1].split([9, 2, 10], 1)]
    assert_close(packed[:1], torch.cat(alone, 1), "several documents in a row")
    assert_close(packed[1:], whole.logits[1:], "one document")
    parallel.set_engine("reference")
    assert_close(parallel(x).logits, whole.logits, "reference")


def test_a_run_takes_all_three_by_name(tmp_path):
    changes = {
        "data.source": "manuals", "data.length": 32, "model.variant": "parallel", "model.d_model": 16,
        "model.n_layers": 1, "model.miras": "{retention: {name: row_cap, cap: 2}}", "training.steps": 2,
        "training.batch_size": 2, "training.eval_tokens": 64, "training.device": "cpu", "training.threads": 1,
    }  # fmt: skip
    words = ["train", "--config", str(ROOT / "configs" / "mac.yaml"), "--output", str(tmp_path / "run")]
    assert main([*words, *(word for change in changes.items() for word in ("--set", "{}={}".format(*change)))]) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    model = load_model(tmp_path / "run" / "model")
    assert model.config.variant == "parallel" and model.config.rule.retention == RowCap(cap=2)


def test_what_is_derived_from_the_library_s_own_is_not_taken_for_it():
    class Halved(SphereRetention):
        def project(self, accumulated, anchor):
            return super().project(accumulated, anchor) / 2

    class Louder(L2):
        def error(self, residual, delta=None):
            return 5 * super().error(residual, delta)

    class Faded(Momentum):
        momentum = False

    for change in ({"retention": Halved()}, {"bias": Louder()}, {"algorithm": Faded()}):
        torch.manual_seed(0)
        memory = NeuralMemory(12, n_heads=2, chunk_size=4, miras=MirasConfig(**change)).double()
        y = memory(vectors())
        memory.engine = "reference"
        assert_close(memory(vectors()), y, str(change))


def test_slips_are_named():
    with pytest.raises(TypeError, match=r'Slip.variants must be a tuple such as \("MAC",\), got \'slip\''):
        type("Slip", (Mixer,), {"variants": "slip"})
    with pytest.raises(TypeError, match="variant 'MAC' is taken by MACMixer"):
        type("Slip", (Mixer,), {"variants": ("MAC",)})
    assert not {"s", "slip"} & set(MIXERS)
    with pytest.raises(TypeError, match=r'corpus needs a name, as in @corpus\("notes"\), got <function'):
        corpus(manuals)
    with pytest.raises(ValueError, match="corpus 'stdlib' is taken by stdlib_documents"):
        corpus("stdlib")(manuals)
    assert corpus("manuals")(manuals) is CORPORA["manuals"], "a cell of a notebook, run again"
    with pytest.raises(FileNotFoundError, match="neither .*manuals.* nor an existing file"):
        load_documents("manual")
