"""MACTransformer: the calls of python-titans-miras as its page prints them, variants, loss, streaming, sampling."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close
from titans.miras import MirasConfig
from titans.miras.retention import Retention
from titans.models import build_model
from titans_miras import MACTransformer, MIRASArchitecture, TransformerConfig, __version__
from titans_miras.transformer import min_p_filter

QUICK_START = """
import torch
from titans_miras import (
    MACTransformer,
    TransformerConfig,
    NeuralMemoryConfig,
    MIRASConfig,
    MIRASArchitecture,
)

# Configure the model
config = TransformerConfig(
    num_tokens=256,           # Vocabulary size (256 for byte-level)
    dim=512,                  # Model dimension
    depth=6,                  # Number of transformer layers
    segment_len=64,           # Segment length for memory operations
    neural_mem=NeuralMemoryConfig(
        dim=512,
        heads=8,
        depth=2,              # Depth of memory MLP
    ),
    miras=MIRASConfig(
        architecture=MIRASArchitecture.DEFAULT,  # or YAAD, MONETA, MEMORA
    ),
)

# Create model
model = MACTransformer(config=config)

# Forward pass
x = torch.randint(0, 256, (1, 512))  # (batch, seq_len)
logits = model(x)                     # (batch, seq_len, vocab_size)

# Training with loss
loss = model(x, return_loss=True)
loss.backward()
"""

VARIANTS = """
from titans_miras import MIRASConfig, MIRASArchitecture

# YAAD: Robust to outliers
yaad_config = MIRASConfig(
    architecture=MIRASArchitecture.YAAD,
    yaad_delta=1.0,  # Huber loss threshold
)

# MONETA: Generalized p-norms
moneta_config = MIRASConfig(
    architecture=MIRASArchitecture.MONETA,
    moneta_bias_p=1.5,
    moneta_gate_p=1.5,
)

# MEMORA: Probability map constraints
memora_config = MIRASConfig(
    architecture=MIRASArchitecture.MEMORA,
    memora_temperature=1.0,
)
"""

VARIANT = pytest.mark.parametrize("variant", [variant.value for variant in MIRASArchitecture])


def run(program):
    names = {}
    exec(program, names)
    return names


def check_quick_start(names):
    assert names["logits"].shape == (1, 512, 256)
    assert names["loss"].shape == ()
    gradients = [p.grad for p in names["model"].parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def small(variant="default", seed=0, miras=None, **memory):
    torch.manual_seed(seed)
    rule = {"architecture": variant, **(miras or {})}
    memory = {"heads": 2, "chunk_size": 4, **memory}
    shape = {"num_tokens": 31, "dim": 16, "depth": 2, "segment_len": 8, "heads": 2, "num_persist_mem_tokens": 2}
    return MACTransformer(config=TransformerConfig(**shape, miras=rule, neural_mem=memory)).double()


def text(rows=2, tokens=29):
    return torch.randint(31, (rows, tokens), generator=torch.Generator().manual_seed(3))


def test_quick_start_on_a_small_model():
    torch.manual_seed(0)
    program = QUICK_START.replace("dim=512", "dim=32").replace("depth=6", "depth=1")
    check_quick_start(run(program))


@pytest.mark.slow
def test_quick_start_as_printed():
    torch.manual_seed(0)
    names = run(QUICK_START)
    check_quick_start(names)
    assert sum(p.grad.square().sum() for p in names["model"].parameters()).sqrt() < 100


def test_the_page_shows_one_model_twice():
    page = (Path(__file__).parents[2] / "docs" / "from_python_titans_miras.md").read_text()
    before, after = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for full, less in (
        ("dim=512", "dim=64"),
        ("depth=6", "depth=1"),
        ("d_model=512", "d_model=64"),
        ("layers=6", "layers=1"),
    ):
        before, after = before.replace(full, less), after.replace(full, less)
    names, new = run(before), run(after.replace("0.1 / 64", "0.1 / 8"))
    assert names["more"].shape == (1, 5, 256)
    assert names["model"].model.config == new["model"].config
    assert new["out"].logits.shape == names["logits"].shape


def test_variants_as_printed():
    for name, rule in run(VARIANTS).items():
        if name.endswith("_config"):
            shape = {"num_tokens": 31, "dim": 16, "depth": 1, "segment_len": 8, "heads": 2}
            assert MACTransformer(config=TransformerConfig(**shape, miras=rule))(text()).shape == (2, 29, 31)
            assert rule.architecture.value == name.removesuffix("_config")
    assert __version__


def test_four_variants_compute_four_things_from_the_same_weights():
    found = []
    common = small("default", momentum=False).state_dict()
    for variant in MIRASArchitecture:
        model = small(variant.value, momentum=False)
        model.load_state_dict(common)
        loss = model(text(), return_loss=True)
        loss.backward()
        mixers = [block.mixer for block in model.model.blocks]
        gradient = torch.cat([w.grad.flatten() for m in mixers for w in m.memory.initial_weights])
        found.append((model(text()).detach(), gradient / gradient.norm()))
    for (logits, gradient), (other_logits, other_gradient) in itertools.combinations(found, 2):
        assert (logits - other_logits).abs().max() > 1e-4
        assert (gradient - other_gradient).norm() > 1e-2


@VARIANT
def test_every_variant_learns(variant):
    model = small(variant).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        losses.append(model(text(tokens=17), return_loss=True))
        optimizer.zero_grad()
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@VARIANT
def test_the_loss_is_the_cross_entropy_of_the_next_token(variant):
    model, x = small(variant), text()
    manual = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert_close(model(x, return_loss=True), manual)


@VARIANT
@pytest.mark.parametrize("sizes", [(8, 8, 13), (5, 1, 3, 7, 13), (1,) * 29])
def test_any_split_gives_what_one_call_gives(variant, sizes):
    model, x = small(variant), text()
    whole, end = model(x, return_state=True)
    state, pieces = None, []
    for piece in x.split(sizes, 1):
        logits, state = model(piece, state=state, return_state=True)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), whole)
    assert state.seen == end.seen == (29, 29)


def test_a_cache_takes_the_whole_text_so_far():
    model, x = small(), text()
    logits, cache = model(x[:, :11], return_cache=True)
    pieces = [logits]
    for length in (12, 13, 29):
        logits, cache = model(x[:, :length], cache=cache, return_cache=True, disable_flex_attn=True)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), model(x))


def test_a_loss_goes_on_from_a_state():
    model, x = small(), text()
    loss, state = model(x[:, :12], return_loss=True, return_state=True)
    assert_close(loss, model(x[:, :12], return_loss=True))
    manual = F.cross_entropy(model(x)[:, 12:-1].flatten(0, 1), x[:, 13:].flatten())
    assert_close(model(x[:, 12:], return_loss=True, state=state), manual)


def test_calls_that_cannot_be_honoured_say_why():
    model, x = small(), text()
    _, cache = model(x, return_cache=True)
    with pytest.raises(ValueError, match="return_loss_breakdown is refused"):
        model(x, return_loss=True, return_loss_breakdown=True)
    with pytest.raises(ValueError, match="factorized_pos_emb is refused"):
        model(x, factorized_pos_emb=(x,))
    with pytest.raises(ValueError, match="x must be longer than the 29 tokens of cache, got 29"):
        model(x, cache=cache)
    with pytest.raises(ValueError, match="cache goes neither with state"):
        model(x, cache=cache, state=cache)
    with pytest.raises(ValueError, match="neural_memory_model is refused"):
        MACTransformer(config=model.config, neural_memory_model=nn.Linear(8, 8))


def test_sampling_continues_the_prompt_as_reading_it_all_again_would():
    model, x = small(), text(tokens=9)
    new = model.sample(x, 20, temperature=0.0)
    assert new.shape == (2, 11)
    for _ in range(11):
        x = torch.cat((x, model(x)[:, -1:].argmax(-1)), 1)
    assert torch.equal(new, x[:, 9:])
    assert model.sample(x, 5, use_cache=True, show_progress=False).shape == (2, 0)
    sampled = model.sample(x, 30, filter_fn=lambda logits, top: logits.topk(top).values * 0, filter_kwargs={"top": 4})
    assert sampled.min() >= 0 and sampled.max() < 4


def test_min_p_keeps_what_is_likely_enough():
    kept = min_p_filter(torch.tensor([[0.5, 0.4, 0.04, 0.06]]).log(), min_p=0.1).isfinite()
    assert kept.tolist() == [[True, True, False, True]]


def test_an_own_embedding_is_used():
    embedding = nn.Embedding(31, 16).double()
    model = MACTransformer(config=small().config, token_emb=embedding).double()
    model(text(), return_loss=True).backward()
    assert embedding.weight.grad.abs().sum() > 0 and model.model.head.weight.grad.abs().sum() > 0


def test_the_model_is_a_titans_model(tmp_path):
    model = small("moneta")
    assert_close(model(text()), model.model(text()).logits)
    rebuilt = build_model(model.config.to_titans()).double()
    rebuilt.load_state_dict(model.model.state_dict())
    assert_close(rebuilt(text()).logits, model(text()))


@pytest.mark.parametrize("momentum", [True, False])
def test_a_temperature_divides_what_memora_accumulates(momentum):
    class Tempered(Retention):
        name = "tempered"
        inside = "hidden"

        def project(self, accumulated, anchor):
            return (accumulated / 0.25).softmax(-1)

    try:
        model = small("memora", miras={"memora_temperature": 0.25}, max_lr=2.0, momentum=momentum)
        plain = small("memora", max_lr=2.0, momentum=momentum)
        told = plain.config.to_titans()
        rule = MirasConfig(retention=Tempered(), algorithm=told.miras.algorithm)
        expected = build_model(told.model_copy(update={"miras": rule})).double()
    finally:
        Retention.members.pop("tempered", None)
    expected.load_state_dict(plain.model.state_dict())
    assert_close(model(text()), expected(text()).logits)
    assert (model(text()) - plain(text())).abs().max() > 1e-4


def test_starting_gates():
    model = small(init_adaptive_step_bias=0.5, init_momentum_bias=-1.0, init_decay_bias=-3.0)
    plain = small()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    for block, other in zip(model.model.blocks, plain.model.blocks, strict=True):
        trace = block.mixer.memory.trace(x)
        for gate, bias in ((trace.theta * 80 / (1 - trace.eta), 0.5), (trace.eta, -1.0), (trace.alpha, -3.0)):
            assert_close(gate, torch.full_like(gate, bias).sigmoid())
        usual = other.mixer.memory.trace(x).alpha
        assert 3e-4 < usual.min() < usual.max() < 3e-3 and usual.std() > 0
    without = small("memora", init_decay_bias=-3.0).model.blocks[0].mixer.memory.trace(x)
    assert_close(without.alpha, torch.full_like(without.alpha, -3.0).sigmoid())
    assert without.theta.std() > 0
