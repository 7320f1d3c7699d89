"""The law: chunked = reference, whole = any split, padding and store masks, gates of exactly 0 and 1."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import assert_close
from members import ALGORITHMS, BIASES, NETWORKS, RETENTIONS, built_in, pairwise
from scan_cases import BATCH, WIDTH, cut, leaves, make, pick, run, state_tensors
from titans.miras import MirasConfig
from titans.ops.memory import (
    Gates,
    MemoryState,
    Rule,
    Tokens,
    check_finite,
    chunked,
    memory_read,
    memory_scan,
    memory_trace,
    native,
)
from titans.ops.memory import pick as pick_engine
from titans.ops.memory.chunked import empty_chunk
from titans.ops.rows import Rows
from titans.state import counts


def gradients(y, state, tensors):
    """Of a fixed random functional of the outputs and of every tensor of the final state."""
    random = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=random, dtype=x.dtype)).sum() for x in (y, *state_tensors(state)))
    named = list(leaves(tensors))
    found = torch.autograd.grad(total, [x for _, x in named], allow_unused=True, materialize_grads=True)
    return dict(zip([n for n, _ in named], found, strict=True))


def check_engines_agree(tensors, miras, chunk, engine="chunked", **options):
    y, state = run(tensors, miras, chunk, engine=engine, **options)
    y_ref, state_ref = run(tensors, miras, chunk, engine="reference", **options)
    assert_close(y, y_ref, "y")
    assert state.count == state_ref.count
    for i, (a, b) in enumerate(zip(state_tensors(state), state_tensors(state_ref), strict=True)):
        assert_close(a, b, f"state tensor {i}")
    expected = gradients(y_ref, state_ref, tensors)
    for name, grad in gradients(y, state, tensors).items():
        assert_close(grad, expected[name], f"gradient of {name}")


CASES = pairwise(
    bias=list(BIASES),
    retention=list(RETENTIONS),
    algorithm=list(ALGORITHMS),
    network=list(NETWORKS),
    gates=["head", "channel"],
    forgetting=[True, False],
    norm=[True, False],
    tokens=[1, 7, 23],
    chunk=[1, 5, 16, 64],
)


def fast_engines():
    """Those that this machine has."""
    return ["fused", *(["native"] if native.available() else [])]


def test_a_chunk_has_64_tokens_unless_told():
    tensors, miras = make(tokens=65)
    found, expected = memory_scan(**tensors, miras=miras), run(tensors, miras, 64, engine="auto")
    assert all(map(torch.equal, (found[0], *state_tensors(found[1])), (expected[0], *state_tensors(expected[1]))))


@pytest.mark.parametrize("engine", fast_engines())
@pytest.mark.parametrize("network", ["matrix", "mlp"])
@pytest.mark.parametrize("retention", ["weight_decay", "sphere", "anchored"])
def test_fast_engines_equal_reference(network, retention, engine):
    """Around their runs of whole chunks the general loop does open chunks, padding and what is not in step."""
    for algorithm, norm, forgetting in itertools.product(
        ["momentum", "gradient_descent"], [True, False], [True, False]
    ):
        tensors, miras = make(network, retention, algorithm, forgetting=forgetting, norm=norm, tokens=23)
        check_engines_agree(tensors, miras, 5, engine)
    store = torch.rand(BATCH, 23, generator=torch.Generator().manual_seed(3)) > 0.4
    check_engines_agree(tensors, miras, 5, engine, store_mask=store)
    mask = torch.ones(BATCH, 23, dtype=torch.bool)
    mask[0, :2] = mask[1, 9] = False
    check_engines_agree(tensors, miras, 5, engine, mask=mask)
    _, state = run(cut(tensors, 0, 7), miras, 5, engine)
    check_engines_agree(cut(tensors, 7, 23), miras, 5, engine, state=state.detach())
    # Chunks of 8 as above: at 4 the recurrence of this draw is chaotic on the sphere, in every engine alike.
    tensors, miras = make(network, retention, tokens=23, extreme=True)
    check_engines_agree(tensors, miras, 8, engine)


@pytest.mark.parametrize("engine", fast_engines())
def test_a_fast_engine_does_runs_of_whole_chunks_at_once(engine, monkeypatch):
    """Else it is as slow as the loop, and nobody notices."""
    did, walk = [], chunked._Walk.run
    monkeypatch.setattr(chunked._Walk, "run", lambda self, f, x: (did.append(x.q.shape[1]), walk(self, f, x))[1])
    tensors, miras = make(tokens=23)
    run(tensors, miras, 5, engine)
    assert did == [20]
    run(tensors, miras, 5, "chunked")
    assert did == [20]


def test_a_fast_engine_is_refused_where_it_does_not_know_the_rule():
    tensors, miras = make(retention="lq4", tokens=7)
    for engine in fast_engines():
        with pytest.raises(ValueError, match=rf"engine '{engine}' cannot be used: retention LqRetention"):
            run(tensors, miras, 4, engine)
    assert pick_engine("auto", miras, torch.device("cpu"))[0] == "chunked"
    steady = pick_engine("auto", MirasConfig.steady(), torch.device("cpu"))
    assert steady[0] == fast_engines()[-1]


def refused(algorithm, network, **_):
    """Muon orthogonalises matrices: MirasConfig says so when one of the maps is a vector."""
    return ALGORITHMS[algorithm].per_chunk and any(len(s) == 1 for s in NETWORKS[network].shapes(WIDTH))


@pytest.mark.parametrize("case", [c for c in CASES if not refused(**c)], ids=lambda c: "-".join(map(str, c.values())))
def test_chunked_equals_reference(case):
    chunk = case["chunk"]
    tensors, miras = make(**{k: v for k, v in case.items() if k != "chunk"})
    check_engines_agree(tensors, miras, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["matrix", "mlp", "gated_mlp"])
@pytest.mark.parametrize("algorithm", built_in(ALGORITHMS))
@pytest.mark.parametrize("retention", built_in(RETENTIONS))
@pytest.mark.parametrize("bias", built_in(BIASES))
def test_chunked_equals_reference_for_every_combination(bias, retention, algorithm, network):
    # Channel gates meet every retention and algorithm with the two biases whose thresholds they differ in.
    kinds = ["head", "channel"] if bias in ("l2", "huber_mixture_learned") else ["head"]
    for gates, chunk in itertools.product(kinds, [1, 5, 16]):
        tensors, miras = make(network, retention, algorithm, bias, gates, tokens=17)
        check_engines_agree(tensors, miras, chunk)
        with torch.no_grad():
            check_split(tensors, miras, chunk, (1, 6, 7, 12))
            check_padding(tensors, miras, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("retention", ["weight_decay", "sphere", "anchored"])
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_chunked_equals_reference_at_any_length(network, retention, chunk, tokens):
    for momentum, forgetting, norm in itertools.product([True, False], repeat=3):
        algorithm = "momentum" if momentum else "gradient_descent"
        tensors, miras = make(network, retention, algorithm, forgetting=forgetting, norm=norm, tokens=tokens)
        check_engines_agree(tensors, miras, chunk)
    for norm in (True, False):
        tensors, miras = make(network, retention, norm=norm, tokens=tokens, extreme=True)
        check_engines_agree(tensors, miras, chunk)


@pytest.mark.parametrize("network", ["matrix", "mlp"])
@pytest.mark.parametrize("gates", ["head", "channel"])
@pytest.mark.parametrize("retention", ["weight_decay", "sphere", "anchored", "elastic_net", "kl"])
def test_gates_of_exactly_zero_and_one(network, retention, gates):
    tensors, miras = make(network, retention, gates=gates, tokens=23, extreme=True, norm=True)
    check_engines_agree(tensors, miras, 8)


def test_rows_forgotten_to_nothing_stay_finite_on_the_sphere_and_are_written_again():
    tensors, miras = make("matrix", tokens=12)
    with torch.no_grad():
        tensors["alpha"][:, :4], tensors["theta"][:, :4], tensors["eta"][:, :4] = 1, 0, 0
    y, state = run(tensors, miras, 2)
    assert all(torch.isfinite(x).all() for x in (y, *gradients(y, state, tensors).values()))
    norms = [w.norm(dim=-1) for w in state.weights]
    for found, initial in zip(norms, tensors["weights"], strict=True):
        assert_close(found, initial.norm(dim=-1).expand_as(found), "row norms")


@pytest.mark.parametrize("retention", sorted(RETENTIONS))
@pytest.mark.parametrize(
    ("algorithm", "gates"), [("momentum", "head"), ("gradient_descent", "channel"), ("muon", "head")]
)
def test_masked_and_unstored_tokens_agree_between_engines(retention, algorithm, gates):
    tensors, miras = make(retention=retention, algorithm=algorithm, gates=gates, tokens=19)
    mask = torch.ones(BATCH, 19, dtype=torch.bool)
    mask[0, :5] = mask[0, 9] = mask[1, 14:] = False
    store = torch.rand(BATCH, 19, generator=torch.Generator().manual_seed(3)) > 0.4
    check_engines_agree(tensors, miras, 4, mask=mask, store_mask=store)


@pytest.mark.parametrize("network", ["matrix", "mlp", "gated_mlp"])
@pytest.mark.parametrize("retention", ["weight_decay", "sphere", "anchored"])
def test_gates_of_one_all_along_a_long_text(network, retention):
    # Piece by piece from a common state: from end to end, wiping the weights makes rounding errors grow without bound.
    tensors, miras = make(network, retention, tokens=65)
    random, state = torch.Generator().manual_seed(2), None
    with torch.no_grad():
        for name in ("eta", "alpha"):
            tensors[name][torch.rand(tensors[name].shape, generator=random) > 0.7] = 1
    for start in range(0, 65, 13):
        piece = cut(tensors, start, start + 13)
        check_engines_agree(piece, miras, 8, state=state)
        state = run(piece, miras, 8, state=state)[1].detach()


def check_split(tensors, miras, chunk, cuts, engine="chunked"):
    """Outputs, final state and gradients of the pieces against the whole."""
    tokens = tensors["q"].shape[1]
    y, state = run(tensors, miras, chunk)
    pieces, carried = [], None
    for start, stop in itertools.pairwise((0, *cuts, tokens)):
        piece, carried = run(cut(tensors, start, stop), miras, chunk, engine, state=carried)
        pieces.append(piece)
    joined = torch.cat(pieces, 1)
    assert_close(joined, y, "y")
    for a, b in zip(state_tensors(carried), state_tensors(state), strict=True):
        assert_close(a, b, "state")
    if not torch.is_grad_enabled():
        return
    expected = gradients(y, state, tensors)
    for name, grad in gradients(joined, carried, tensors).items():
        assert_close(grad, expected[name], f"gradient of {name}")


def check_padding(tensors, miras, chunk):
    """Padding anywhere, in two calls, against every row alone."""
    tokens = tensors["q"].shape[1]
    half = tokens // 2
    mask = torch.ones(BATCH, tokens, dtype=torch.bool)
    mask[0, : tokens // 5] = mask[0, half + 1] = False
    mask[1, tokens - tokens // 3 :] = False
    first = run(cut(tensors, 0, half), miras, chunk, mask=mask[:, :half])
    second = run(cut(tensors, half, tokens), miras, chunk, mask=mask[:, half:], state=first[1])
    y = torch.cat((first[0], second[0]), 1)
    assert y[~mask].abs().max() == 0
    for row in range(BATCH):
        alone = pick(tensors, lambda x, row=row: x[row : row + 1][:, mask[row]])
        y_alone, state_alone = run(alone, miras, chunk)
        assert_close(y[row, mask[row]], y_alone[0], f"row {row}")
        assert second[1].count[row] == state_alone.count[0]
        query = tensors["q"][row : row + 1, :3]
        options = {"weights": tensors["weights"], "miras": miras, "norm": tensors["norm"]}
        assert_close(
            memory_read(query, state=second[1].select([row]), **options),
            memory_read(query, state=state_alone, **options),
            f"state of row {row}",
        )


def check_streaming_and_padding(tensors, miras, chunk):
    tokens = tensors["q"].shape[1]
    check_split(tensors, miras, chunk, tuple(range(1, tokens)))
    check_split(tensors, miras, chunk, (tokens // 3,))
    check_padding(tensors, miras, chunk)


@pytest.mark.parametrize("case", [c for c in CASES if not refused(**c)], ids=lambda c: "-".join(map(str, c.values())))
def test_pieces_and_padding_change_nothing(case):
    tensors, miras = make(**{k: v for k, v in {**case, "tokens": 11}.items() if k != "chunk"})
    check_streaming_and_padding(tensors, miras, case["chunk"])


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (3,), (4, 8), (1, 9)])
def test_any_split_equals_the_whole(cuts, engine):
    check_split(*make(tokens=11), 4, cuts, engine)


def test_reset_row_starts_anew_while_the_other_goes_on():
    tensors, miras = make(tokens=7)
    _, state = run(tensors, miras, 4)
    y, after = run(tensors, miras, 4, state=state.reset([0]))
    fresh, _ = run(tensors, miras, 4)
    going_on, _ = run(tensors, miras, 4, state=state)
    assert after.count == (7, 14)
    assert_close(y[0], fresh[0], "reset row")
    assert_close(y[1], going_on[1], "other row")


def test_unstored_tokens_leave_the_memory_untouched_even_with_momentum():
    tensors, miras = make(tokens=9)
    options = {"weights": tensors["weights"], "miras": miras, "norm": tensors["norm"]}
    _, state = run(cut(tensors, 0, 5), miras, 16)
    off = torch.zeros(BATCH, 4, dtype=torch.bool)
    _, later = run(cut(tensors, 5, 9), miras, 16, state=state, store_mask=off)
    query = tensors["q"][:, :3]
    assert_close(memory_read(query, state=later, **options), memory_read(query, state=state, **options), "read")


@pytest.mark.parametrize("case", [c for c in CASES if not refused(**c)], ids=lambda c: "-".join(map(str, c.values())))
def test_read_after_the_last_token_is_that_token_s_own_read(case):
    tensors, miras = make(**{k: v for k, v in {**case, "tokens": 7}.items() if k != "chunk"})
    options = {"weights": tensors["weights"], "miras": miras, "norm": tensors["norm"]}
    with torch.no_grad():
        for stop in range(1, 8):
            y, state = run(cut(tensors, 0, stop), miras, min(case["chunk"], 4))
            read = memory_read(tensors["q"][:, stop - 1 : stop], state=state, **options)
            assert_close(read, y[:, -1:], f"T = {stop}")


def test_trace_gives_the_gradient_norm_of_the_reference():
    tensors, miras = make(tokens=5)
    gates = Gates(tensors["theta"], tensors["eta"], tensors["alpha"], None)
    read = Tokens(tensors["q"], tensors["k"], tensors["v"], gates)
    trace = memory_trace(Rule(miras, tensors["weights"], 8, tensors["norm"]), read, None, Rows.whole((0, 0), 5))
    weights = tuple(w[None, 0].detach().clone().requires_grad_() for w in tensors["weights"])
    k, v = (tensors[n][:1, 2:3, :1].detach() for n in ("k", "v"))
    norm = tuple(n[:1] for n in tensors["norm"])
    value = memory_read(k, weights=tuple(w[0:1] for w in weights), miras=miras, norm=norm)
    loss = miras.bias.loss(value - v).sum()
    found = torch.autograd.grad(loss, weights)
    assert_close(trace.loss[0, 2, 0], loss, "loss")
    assert_close(trace.surprise[0, 2, 0], sum(g.square().sum() for g in found).sqrt(), "surprise")


def test_samples_and_the_past_are_independent_of_a_token():
    tensors, miras = make(tokens=13)
    y, _ = run(tensors, miras, 4)
    changed = dict(tensors)
    for name in ("q", "k", "v"):
        changed[name] = tensors[name].detach().clone()
        changed[name][0, 6] += 1
    y2, _ = run(changed, miras, 4)
    assert_close(y2[1], y[1], "other sample", 0)
    assert_close(y2[0, :6], y[0, :6], "earlier tokens", 0)
    assert (y2[0, 6:] - y[0, 6:]).abs().amax(dim=-1).min() > 1e-9  # every head of every later token


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": torch.zeros(1, 2, 2, 6)}, "k must have"),
        ({"theta": torch.zeros(2, 7)}, "theta must be"),
        ({"weights": (torch.zeros(2, 6, 6),)}, "weights must have shapes"),
        ({"mask": torch.ones(2, 7)}, "mask must be bool"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"engine": "quick"}, "engine must be"),
        ({"theta": None}, "theta must be a tensor"),
        ({"alpha": [torch.zeros(2, 7, 2)]}, "alpha must be a tensor"),
        ({"delta": torch.ones(2, 7, 2)}, "delta must be None"),
        ({"steps": (torch.ones(2), torch.ones(2))}, "steps must be None"),
    ],
)
def test_errors_name_the_argument(change, named):
    tensors, miras = make(tokens=7)
    with pytest.raises(ValueError, match=named):
        memory_scan(**{**tensors, "miras": miras, "chunk_size": 4, **change})


def test_muon_writes_no_rounding_errors():
    # One head of width 2: when both errors have one sign the layer norm's backward is zero, but for rounding.
    miras = MirasConfig(
        architecture="matrix", bias={"name": "huber", "delta": 0.3}, retention="weight_decay", algorithm="muon"
    )
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 2, 9, 1, 2, generator=random, dtype=torch.float64)
        gates = torch.rand(3, 2, 9, 1, generator=random, dtype=torch.float64) * 0.1
        weights = (torch.randn(1, 2, 2, generator=random, dtype=torch.float64),)
        found = [
            memory_scan(q, k, v, *gates, weights=weights, miras=miras, chunk_size=1, engine=engine)[0]
            for engine in ("chunked", "reference")
        ]
        assert_close(*found, f"seed {seed}")


def test_a_term_cannot_be_switched_on_or_off_inside_a_chunk():
    tensors, miras = make(tokens=6)
    _, state = run(tensors, miras, 16)
    with pytest.raises(ValueError, match="until a chunk is complete"):
        run({**tensors, "alpha": None}, miras, 16, state=state)
    channel, other = make(gates="channel", tokens=6)
    with pytest.raises(ValueError, match="gates per head or per channel"):
        run(channel, other, 16, state=state)


def test_a_foreign_state_is_refused():
    tensors, miras = make(tokens=7)
    _, state = run(tensors, miras, 4)
    with pytest.raises(ValueError, match="chunk_size 4, this memory has 8"):
        run(tensors, miras, 8, state=state)
    with pytest.raises(ValueError, match="state has weights"):
        run(tensors, miras, 4, state=state.select([0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("retention", "gates"),
    [("weight_decay", "head"), ("sphere", "head"), ("anchored", "head"), ("lq4", "head"), ("kl", "channel")],
)
def test_compiled_equals_chunked(retention, gates):
    tensors, miras = make(retention=retention, gates=gates, tokens=35)
    y, state = run(tensors, miras, 16, engine="compiled")
    y_plain, state_plain = run(tensors, miras, 16)
    assert_close(y, y_plain, "y")
    expected = gradients(y_plain, state_plain, tensors)
    for name, grad in gradients(y, state, tensors).items():
        assert_close(grad, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("network", ["matrix", "mlp", "gated_mlp"])
@pytest.mark.parametrize("retention", ["sphere", "anchored"])
def test_every_row_keeps_its_norm_whatever_the_input(network, retention):
    tensors, miras = make(network, retention, tokens=64)
    huge = {**tensors, "v": tensors["v"] * 1e6, "theta": torch.full_like(tensors["theta"], 0.5)}
    y, state = run(huge, miras, 8)
    assert torch.isfinite(y).all()
    for now, start in zip(state.weights, tensors["weights"], strict=True):
        assert_close(now.norm(dim=-1), start.norm(dim=-1).expand(BATCH, -1, -1), "row norms")


@pytest.mark.parametrize("network", ["vector", "matrix", "mlp", "gated_mlp"])
def test_an_anchored_memory_that_only_forgets_comes_back_to_its_initial_weights(network):
    tensors, miras = make(network, "anchored", tokens=200)
    _, moved = run(tensors, miras, 8)
    quiet = {**tensors, "theta": torch.zeros_like(tensors["theta"]), "alpha": torch.full_like(tensors["alpha"], 0.1)}
    _, rested = run(quiet, miras, 8, state=moved)
    for now, before, start in zip(rested.weights, moved.weights, tensors["weights"], strict=True):
        assert (before - start).abs().max() > 1e-3
        assert_close(now, start.expand_as(now), "weights", 1e-6)


def test_check_finite_tells_divergence_from_weights_whose_sum_overflows():
    def state(*values):
        weights = (torch.tensor(values).view(1, 1, -1),)
        nothing = torch.zeros(1, 1, 0)
        return MemoryState(weights, (), empty_chunk(weights, Gates(nothing, None, None, nothing)), counts([8]), 8)

    def check(state):
        check_finite([None, state], ["nothing", "it"])

    with torch.no_grad():
        check(state(3e38, 3e38))
        for bad in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(FloatingPointError, match="the memory of it diverged within 8 tokens"):
                check(state(1.0, bad))
        with pytest.raises(FloatingPointError):
            check(state(float("inf"), float("-inf")))
    check(state(float("nan")))  # while gradients are recorded, the loss tells


@pytest.mark.parametrize("engine", fast_engines())
def test_a_backward_pass_inside_autocast_is_as_exact_as_outside(engine):
    """Of what is derived by hand; torch's own derivatives take half precision there, and it advises against that."""
    tensors, miras = make(retention="anchored", tokens=12)

    def single(x):
        return None if x is None else x.detach().float().requires_grad_()

    plain = {n: tuple(map(single, x)) if isinstance(x, tuple) else single(x) for n, x in tensors.items()}
    expected = gradients(*run(plain, miras, 4, engine), plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(*run(plain, miras, 4, engine), plain)
    for name in expected:
        assert_close(found[name], expected[name], f"gradient of {name}")
