"""Biases, retentions and configurations as values: formulas, refusals, JSON, and that every field reaches the code."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from helpers import assert_close
from members import ALGORITHMS, BIASES, NETWORKS, RETENTIONS
from titans import NeuralMemory, TitansConfig
from titans.miras import (
    L2,
    MLP,
    Algorithm,
    Bias,
    ElasticNet,
    GatedMLP,
    Huber,
    KLRetention,
    Lp,
    LqRetention,
    Matrix,
    MirasConfig,
    Network,
    Retention,
    Robust,
    Vector,
)
from titans.miras.algorithm import newton_schulz


def residuals():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ["l2", "lp2.5", "lp3", "lp4", "huber_coordinate", "huber_vector", "robust"])
def test_error_signal_is_the_gradient_of_the_loss(name):
    bias, r = BIASES[name], residuals().requires_grad_()
    assert_close(bias.error(r), torch.autograd.grad(bias.loss(r).sum(), r)[0], name)


def test_the_mixture_switches_on_the_norm():
    bias, r = Huber(delta=2.0, form="mixture"), residuals()
    for row, error in zip(r, bias.error(r), strict=True):
        assert_close(error, row if row.norm() <= 2 else 2 * row.sign(), "error")


def test_lp_below_two_is_smooth_as_math_md_says():
    r = residuals()
    assert_close(Lp(p=1.5).error(r), 1.5 * torch.tanh(10 * r) * torch.sqrt(r**2 + 1e-6) ** 0.5, "lp(1.5)")


@pytest.mark.parametrize("name", list(BIASES))
def test_a_residual_of_exactly_zero_gives_no_error_and_a_finite_slope(name):
    bias, r = BIASES[name], torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    delta = torch.ones(3, 1, dtype=torch.float64) if bias.learned_delta else None
    error = bias.error(r, delta)
    slope = torch.autograd.grad(error.sum(), r)[0]
    assert error.abs().max() == 0 and torch.isfinite(slope).all()
    if name == "l2":
        assert_close(slope, torch.full_like(slope, 2.0), "slope")


def test_lp_two_is_l2():
    assert_close(Lp(p=2).error(residuals()), L2().error(residuals()), "error")


def test_retentions_are_what_math_md_says():
    A = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q_norm = (A.abs() ** 4).sum((1, 2)) ** 0.25
    lq = LqRetention(q=4)
    assert_close(lq.project(A, lq.anchor(A)), A / q_norm.view(-1, 1, 1) ** 2, "lq")
    assert_close(lq.project(1e-5 * A, lq.anchor(A)), 1e-5 * A / (0.01 * q_norm.view(-1, 1, 1)) ** 2, "lq, forgotten")
    W = KLRetention(scale=3.0).project(A, A)
    assert_close(W.sum(-1), torch.full((3, 4), 3.0, dtype=torch.float64), "kl")
    assert_close(ElasticNet(l1=0.5).project(A, A), A.sign() * (A.abs() - 0.5).clamp(min=0), "elastic net")


@pytest.mark.parametrize("algorithm", ["gradient_descent", "momentum", "muon"])
@pytest.mark.parametrize("retention", ["weight_decay", "elastic_net", "sphere", "lq", "anchored", "kl", "sigmoid"])
def test_which_choices_hide_a_chunk_s_writes_until_it_ends(retention, algorithm):
    torch.manual_seed(0)
    rule = MirasConfig(retention=retention, algorithm=algorithm)
    memory = NeuralMemory(12, n_heads=2, chunk_size=4, use_decay=False, miras=rule).double()
    x, query = torch.randn(2, 1, 4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def left_behind(tokens):
        """How much writing the first tokens changes what is read after them."""
        reads = []
        for write in (True, False):
            store = torch.full((1, tokens), write)
            _, state = memory(x[:, :tokens], return_state=True, store_mask=store)
            reads.append(memory.retrieve(query, state=state))
        return (reads[0] - reads[1]).abs().max()

    hidden = retention in ("kl", "sigmoid") or algorithm == "muon"
    assert left_behind(3) == 0 if hidden else left_behind(3) > 1e-3
    assert left_behind(4) > 1e-6


@pytest.mark.parametrize("retention", [LqRetention(q=4), LqRetention(q=1.5)])
def test_lq_starts_at_the_weights_of_a_plain_network(retention):
    W = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A = retention.initial(W)
    assert_close(retention.project(A, retention.anchor(A)), W, "φ(A_0)")


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6), (2, 5, 5)])
def test_newton_schulz_pushes_singular_values_to_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values.min() > 0.6 and values.max() < 1.3
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("name", [n for n in BIASES if n != "error_signal"])
def test_a_configuration_survives_json(name):
    for retention, algorithm in itertools.product(RETENTIONS.values(), ALGORITHMS.values()):
        config = MirasConfig(bias=BIASES[name], retention=retention, algorithm=algorithm, gates="channel")
        assert MirasConfig.model_validate_json(config.model_dump_json()) == config


def test_a_preset_goes_by_its_name_in_a_file():
    assert TitansConfig.model_validate({"miras": "yaad"}).miras == MirasConfig.yaad()
    with pytest.raises(ValidationError, match="'titan' is no preset; there are titans, steady"):
        TitansConfig(miras="titan")


def test_a_plain_function_is_a_bias_that_cannot_be_saved():
    config = MirasConfig(bias=torch.tanh)
    assert_close(config.bias.error(residuals()), torch.tanh(residuals()), "error")
    with pytest.raises(ValueError, match="'tanh' is a bare function"):
        config.model_dump_json()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MirasConfig(architecture=Vector(), algorithm="muon"), "rotates whole matrices"),
        (lambda: Lp(p=0.5), "p\n"),
        (lambda: LqRetention(q=0), "q\n"),
        (lambda: Huber(delta=-1), "delta"),
        (lambda: Huber(delta="big"), "delta"),
        (lambda: Huber(form="round"), "form"),
        (lambda: Robust(radius=-1), "radius"),
        (lambda: ElasticNet(l1=-1), "l1"),
        (lambda: KLRetention(scale=0), "scale"),
        (lambda: MirasConfig(gates="layer"), "gates"),
        (lambda: MirasConfig(bias="cubic"), "bias must be one of .* got 'cubic'"),
        (lambda: MirasConfig(retention={"name": "lq", "p": 3}), "p\n"),
        (lambda: MirasConfig(momentum=True), "momentum"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(make, named):
    with pytest.raises(ValidationError, match=named):
        make()


def output(miras):
    torch.manual_seed(0)
    memory = NeuralMemory(12, n_heads=2, chunk_size=3, miras=miras, theta_max=0.3).double()
    x = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return memory(x)


def variants():
    """For every axis, and every field of every member of it, two values that must not give the same."""
    base = MirasConfig.titans(MLP(expansion=1))
    for axis, members in (
        ("architecture", NETWORKS), ("bias", BIASES), ("retention", RETENTIONS), ("algorithm", ALGORITHMS)
    ):  # fmt: skip
        for a, b in itertools.combinations(members.values(), 2):
            yield f"{axis}: {a!r} / {b!r}", *(MirasConfig(**{**dict(base), axis: member}) for member in (a, b))
    fields = [
        *[(cls(), "residual_norm", True, False) for cls in (Vector, Matrix, MLP, GatedMLP)],
        (MLP(), "depth", 2, 3), (MLP(), "expansion", 2, 3), (MLP(), "activation", "gelu", "silu"),
        (GatedMLP(), "expansion", 2, 3), (GatedMLP(), "activation", "gelu", "silu"),
        (Lp(), "p", 3, 3.5), (Lp(), "p", 1.2, 1.5), (Huber(), "delta", 0.9, 1.0), (Huber(), "delta", 1.0, "learned"),
        (Huber(delta=0.9), "form", "coordinate", "vector"), (Robust(), "radius", 0.1, 0.2),
        (LqRetention(), "q", 3.5, 4), (KLRetention(), "scale", 1.0, 2.0), (ElasticNet(), "l1", 0.01, 0.02),
    ]  # fmt: skip
    for member, field, a, b in fields:
        found = (MirasConfig(**{**dict(base), member.axis: member.model_copy(update={field: v})}) for v in (a, b))
        yield f"{member.name}.{field}", *found
    yield "gates", base, base.model_copy(update={"gates": "channel"})


def test_every_setting_reaches_the_code():
    outputs = {}
    for name, a, b in variants():
        for config in (a, b):
            if repr(config) not in outputs:
                outputs[repr(config)] = output(config)
        different = (outputs[repr(a)] - outputs[repr(b)]).abs().max()
        assert different > 1e-9, f"{name} makes no difference"


def test_every_field_of_every_member_is_in_that_test():
    named = {name for name, _, _ in variants()}
    for axis in (Network, Bias, Retention, Algorithm):
        for cls in axis.members.values():
            if cls.__module__.startswith("titans.") and cls.name != "error_signal":
                missing = {f"{cls.name}.{field}" for field in cls.model_fields} - named
                assert not missing, f"give `variants` above two values each of {', '.join(sorted(missing))}"


def test_a_member_without_a_name_of_its_own_is_not_saved_as_its_parent():
    class Louder(Huber):
        def error(self, residual, delta=None):
            return 5 * super().error(residual, delta)

    with pytest.raises(ValueError, match="Louder needs a name of its own"):
        MirasConfig(bias=Louder()).model_dump_json()


@pytest.mark.filterwarnings("ignore:Field name")
def test_names_are_taken_once_and_are_no_fields():
    with pytest.raises(TypeError, match="'l2' is taken by L2"):
        type("Other", (Bias,), {"name": "l2", "__annotations__": {"name": "ClassVar[str]"}, "__module__": __name__})
    with pytest.raises(TypeError, match="must be a ClassVar"):
        type("Other", (Bias,), {"name": "other", "__annotations__": {"name": str}, "__module__": __name__})


@pytest.mark.parametrize("q", [2.5, 2.95, 3.0, 3.02, 3.5, 8.0])
def test_lq_starts_at_a_sane_size_for_every_q(q):
    torch.manual_seed(0)
    memory = NeuralMemory(64, n_heads=1, chunk_size=8, miras=MirasConfig.moneta(q=q))
    assert all(1e-3 < w.abs().max() < 1e3 for w in memory.initial_weights)
    assert torch.isfinite(memory(torch.randn(1, 40, 64))).all()
