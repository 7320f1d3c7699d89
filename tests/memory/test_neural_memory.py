"""The memory as a layer: streaming, reading without writing, traces, masks, shorthands, errors."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close
from titans import MirasConfig, NeuralMemory, PersistentMemory, TitansConfig, build_model
from titans.miras import Matrix
from titans.ops.memory import memory_read
from titans.ops.rows import Rows


@pytest.fixture
def memory():
    torch.manual_seed(0)
    return NeuralMemory(d_model=12, n_heads=2, chunk_size=4).double()


def begin(x):
    return Rows.whole((0,) * x.shape[0], x.shape[1])


def inputs(tokens=11):
    return torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_stream_equals_whole(memory):
    x = inputs()
    y, state = memory(x, return_state=True)
    pieces, carried = [], None
    for t in range(11):
        piece, carried = memory(x[:, t : t + 1], state=carried, return_state=True)
        pieces.append(piece)
    assert_close(torch.cat(pieces, 1), y, "y")
    assert carried.seen == state.seen == (11, 11)


@pytest.mark.parametrize("tokens", [11, 12])  # inside a chunk, and at its end
def test_retrieve_reads_what_the_last_token_read_and_writes_nothing(tokens):
    torch.manual_seed(0)
    # Without a convolution, for which a retrieved token would follow the last one.
    memory = NeuralMemory(d_model=12, n_heads=2, chunk_size=4, conv_kernel=0).double()
    x, following = inputs(tokens), inputs(3)
    y, state = memory(x, return_state=True)
    expected = memory(following, state=state)
    assert_close(memory.retrieve(x[:, -1:], state=state), y[:, -1:], "read")
    assert_close(memory(following, state=state), expected, "going on after a retrieval", 0)


def test_repetition_lowers_the_surprise(memory):
    x = inputs(4).repeat(1, 6, 1)
    trace = memory.trace(x)
    assert trace.surprise.shape == trace.loss.shape == trace.theta.shape == (2, 24, 2)
    assert trace.loss[:, -4:].mean() < trace.loss[:, 4:8].mean()


@pytest.mark.parametrize("rule", [MirasConfig.titans(), MirasConfig.steady(), MirasConfig.memora(), "muon"])
def test_a_trace_tells_what_a_write_achieved(rule):
    torch.manual_seed(0)
    rule = MirasConfig(algorithm="muon") if rule == "muon" else rule
    memory = NeuralMemory(d_model=12, n_heads=2, chunk_size=4, miras=rule).double()
    x = inputs(11)
    trace = memory.trace(x)
    _, state = memory(x[:, :8], return_state=True)
    q, k, v, _ = memory._project(x, None, begin(x))
    weights = {"weights": tuple(memory.initial_weights), "miras": memory.miras}
    now = memory_read(k, state=state.memory, norm=(memory.norm_gain, memory.norm_bias), **weights)
    expected = memory.miras.bias.loss(now - v, None)
    assert_close(trace.after[:, 4:8], expected[:, 4:8], "inner loss after the chunk")
    assert trace.after[:, 8:].isnan().all() and not trace.after[:, :8].isnan().any()


def test_mask_gives_each_row_what_it_gives_alone(memory):
    x = inputs()
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :5] = False
    y, state = memory(x, return_state=True, mask=mask)
    assert_close(y[:1, 5:], memory(x[:1, 5:]), "padded row")
    assert y[0, :5].abs().max() == 0
    fresh, _ = memory(x, state=state.reset([1]), return_state=True)
    assert_close(fresh[1:], memory(x[1:]), "reset row")


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_picked_from_a_ragged_state_goes_on_as_it_would_alone(memory, row):
    x = inputs(8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False  # row 0 stands at a chunk's start, row 1 inside a chunk
    _, state = memory(x, return_state=True, mask=mask)
    y = memory(inputs(3)[:1], state=state.select([row]))
    alone = memory(torch.cat((x[row : row + 1][:, mask[row]], inputs(3)[:1]), 1))
    assert_close(y, alone[:, -3:], "row that goes on alone")


def test_a_store_mask_of_zeros_leaves_reads_at_the_initial_weights(memory):
    x = inputs()
    off = torch.zeros(2, 11, dtype=torch.bool)
    assert_close(memory(x, store_mask=off), memory.retrieve(x), "reads")


@pytest.mark.parametrize("retention", ["titans", "steady"])
def test_bfloat16_inputs_keep_a_float32_state(retention):
    torch.manual_seed(0)
    layer = NeuralMemory(12, n_heads=2, chunk_size=4, miras=getattr(MirasConfig, retention)())
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(inputs().float(), return_state=True)
    assert state.memory.weights[0].dtype == torch.float32
    assert torch.isfinite(y).all()


def test_a_million_scale_input_stays_finite():
    torch.manual_seed(0)
    layer = NeuralMemory(12, n_heads=2, chunk_size=8)
    with torch.no_grad():
        assert torch.isfinite(layer(1e6 * inputs(400).float())).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: NeuralMemory(12, n_heads=5), "n_heads must divide d_model = 12, got 5"),
        (lambda: NeuralMemory(12, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: NeuralMemory(12, n_layers=3, miras=MirasConfig.titans()), "mem_layers = 3 contradicts miras"),
        (lambda: NeuralMemory(12, n_layers=1, d_hidden=24), "d_hidden = 24 needs a memory with a hidden layer"),
        (lambda: NeuralMemory(12, qkv_activation="relu"), "qkv_activation must be"),
        (lambda: PersistentMemory(-1, 4), "n_tokens must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m(torch.zeros(2, 3)), r"x must be a non-empty \[B, T, 12\]"),
        (lambda m: m(torch.zeros(2, 3, 12, dtype=torch.long)), "x must be floating point"),
        (lambda m: m(inputs(), mask=torch.ones(2, 11)), "mask must be bool"),
        (lambda m: m(inputs(), state=3), "state must be a NeuralMemoryState, got int"),
        (lambda m: m(inputs()[:1], state=m(inputs(), return_state=True)[1]), "state has 2 rows, x has 1"),
    ],
)
def test_wrong_calls_are_named(memory, call, named):
    with pytest.raises(ValueError, match=named):
        call(memory)


def test_persistent_memory_prepends_strips_and_freezes():
    persistent = PersistentMemory(3, 4)
    x = torch.randn(2, 5, 4)
    assert torch.equal(persistent.strip(persistent(x)), x)
    assert torch.equal(persistent(x)[1, :3], persistent.P)
    persistent.freeze()
    assert not persistent.P.requires_grad
    persistent.unfreeze()
    assert persistent.P.requires_grad


@pytest.mark.parametrize("built", ["layer", "model"])
def test_a_new_memory_files_every_token_under_the_query_before_it(built):
    layer = NeuralMemory(32, n_heads=2, chunk_size=4)
    if built == "model":
        config = TitansConfig(variant="LMM", vocab_size=7, d_model=32, mem_heads=2, n_layers=1, chunk_size=4)
        layer = build_model(config).blocks[0].mixer.branch.memory
    x = torch.randn(3, 50, 32)
    q, k, _, _ = layer._project(x, None, begin(x))
    alike = (k[:, 4:] * q[:, 3:-1]).sum(-1)
    assert alike.mean() > 0.9
    assert (k[:, 4:] * q[:, 4:]).sum(-1).abs().mean() < 0.5


@pytest.mark.parametrize("kernel", [0, 1, 2])
def test_any_kernel_starts_with_keys_of_unit_length(kernel):
    layer, x = NeuralMemory(16, conv_kernel=kernel, chunk_size=4), torch.randn(2, 9, 16)
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    _, k, _, _ = layer._project(x, None, begin(x))
    assert torch.allclose(k.norm(dim=-1), torch.ones(()))


def test_values_are_no_longer_than_what_the_memory_can_return():
    """A much longer value's error hardly fades: it would be written again and again, in steps beyond the cap of θ."""
    torch.manual_seed(0)
    layer = NeuralMemory(12, n_heads=2, chunk_size=4, conv_kernel=0).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64) * torch.tensor([1, 100, 1, 0, 100, 1]).view(1, 6, 1)
    x.requires_grad_()
    plain = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 6))
    length, longest = plain.norm(dim=-1, keepdim=True), 6**0.5
    assert (length > longest).any() and (length < longest).any() and not length[:, 3].any()
    assert_close(
        layer._project(x, None, begin(x))[2],
        torch.where(length > longest, plain * longest / length, plain),
    )
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    bare = NeuralMemory(12, n_heads=2, conv_kernel=0, miras=MirasConfig(architecture=Matrix(residual_norm=False)))
    assert bare._project(x.float(), None, begin(x))[2].norm(dim=-1).max() > 10 * longest


@pytest.mark.parametrize("gates", ["head", "channel"])
@pytest.mark.parametrize("algorithm", ["gradient_descent", "momentum", "muon"])
def test_momentum_makes_no_step_longer_than_the_cap(algorithm, gates):
    """With θ at its most and gradients of length 1, S_t = η_t S_{t-1} - θ_t g_t stays below theta_max."""
    rule = MirasConfig(algorithm=algorithm, gates=gates)
    layer = NeuralMemory(12, n_heads=2, chunk_size=4, miras=rule, theta_max=0.3).double()
    steps = sum(n for (name, _), n in zip(layer.gates.parts, layer.gates.sizes, strict=True) if name == "theta")
    with torch.no_grad():
        layer.gates.up.weight.normal_(std=0.5)  # η anywhere
        layer.gates.up.weight[:steps] = 0
        layer.gates.up.bias[:steps] = 50.0
    found, _ = layer.gates(inputs(200))
    thetas, eta = found.theta, found.eta
    for theta in thetas if gates == "channel" else (thetas.unsqueeze(-1),):
        if algorithm != "momentum":
            assert_close(theta, torch.full_like(theta, 0.3))
            continue
        assert eta.min() < 0.2 and eta.max() > 0.8
        momentum = torch.zeros_like(theta[:, 0])
        for t in range(theta.shape[1]):
            momentum = eta[:, t].unsqueeze(-1) * momentum + theta[:, t]
            assert momentum.max() <= 0.3 + 1e-12
        assert momentum.min() > 0.29


def test_hooks_are_called_where_cpp_would_pass_a_layer_by():
    layer, called = NeuralMemory(16, n_heads=2, chunk_size=4), []
    x = torch.randn(1, 9, 16)
    wanted = layer(x)
    for name in ("conv", "read_norm"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(layer(x), wanted)
    assert called == ["conv", "read_norm"]
