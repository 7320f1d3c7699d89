"""Each preset at C = 1 against a literal transcription of its paper's equations (loops, autograd for the gradient)."""

import torch
import torch.nn.functional as F

from helpers import assert_close
from titans.miras import MLP, MirasConfig
from titans.ops.memory import memory_scan

T, D, HIDDEN = 9, 5, 7


def problem(momentum):
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def gate(low, high):
        return torch.rand(T, generator=random, dtype=torch.float64) * (high - low) + low

    q, k, v = (F.normalize(draw(T, D), dim=-1) for _ in range(3))
    weights = draw(HIDDEN, D) / D**0.5, draw(D, HIDDEN) / HIDDEN**0.5
    return q, k, v, gate(0.01, 0.2), gate(0, 1) if momentum else None, gate(0, 0.1), weights


def network(weights, x):
    return weights[1] @ F.gelu(weights[0] @ x)


def gradients(weights, k, error_signal):
    """∇_W of the objective whose derivative with respect to the memory's output is ``error_signal(output)``."""
    leaves = [w.detach().requires_grad_() for w in weights]
    output = network(leaves, k)
    return torch.autograd.grad(output, leaves, error_signal(output.detach()))


def check(preset, equation):
    """``equation(A, S, t, θ, η, α, k, v) -> A, S`` with W = read(A) as the preset's paper writes it."""
    rule = preset(architecture=MLP(depth=2, expansion=HIDDEN / D, residual_norm=False))
    q, k, v, theta, eta, alpha, weights = problem(rule.algorithm.momentum)
    y = torch.stack(equation(q, k, v, theta, eta, alpha, weights))
    found, _ = memory_scan(
        *(x[None, :, None] for x in (q, k, v)),
        *(None if g is None else g[None, :, None] for g in (theta, eta, alpha)),
        weights=tuple(w[None] for w in weights), miras=rule, chunk_size=1,
    )  # fmt: skip
    assert_close(found[0, :, 0], y, rule.bias.name)


def test_titans_equations_13_and_14():
    def titans(q, k, v, theta, eta, alpha, weights):
        M = list(weights)
        S = [torch.zeros_like(w) for w in M]
        for t in range(T):
            grad = gradients(M, k[t], lambda y, t=t: 2 * (y - v[t]))  # ∇‖M(k_t) - v_t‖²
            S = [eta[t] * s - theta[t] * g for s, g in zip(S, grad)]  # Eq. 14
            M = [(1 - alpha[t]) * m + s for m, s in zip(M, S)]  # Eq. 13
            yield network(M, q[t])

    check(MirasConfig.titans, lambda *a: list(titans(*a)))


def test_miras_equation_24_moneta():
    def moneta(q, k, v, theta, eta, alpha, weights):
        p, qq = 3, 4

        def normalised(a):
            return a / (a.abs() ** qq).sum() ** ((qq - 2) / qq)  # A / ‖A‖_q^{q-2}

        A = list(weights)
        for t in range(T):
            W = [normalised(a) for a in A]
            grad = gradients(W, k[t], lambda y, t=t: p * (y - v[t]).sign() * (y - v[t]).abs() ** (p - 1))
            A = [(1 - alpha[t]) * a - theta[t] * g for a, g in zip(A, grad)]
            yield network([normalised(a) for a in A], q[t])

    check(MirasConfig.moneta, lambda *a: list(moneta(*a)))


def test_miras_equation_26_yaad():
    delta = 1.2

    def yaad(q, k, v, theta, eta, alpha, weights):
        W, cases = list(weights), set()
        for t in range(T):
            output = network(W, k[t])
            inside = bool((output - v[t]).norm() <= delta)
            cases.add(inside)
            error = output - v[t] if inside else delta * (output - v[t]).sign()
            grad = gradients(W, k[t], lambda y, error=error: error)
            W = [(1 - alpha[t]) * w - theta[t] * g for w, g in zip(W, grad)]
            yield network(W, q[t])
        assert cases == {True, False}, "the text must meet both sides of the threshold"

    check(lambda architecture: MirasConfig.yaad(delta, architecture), lambda *a: list(yaad(*a)))


def test_miras_equation_27_memora():
    def memora(q, k, v, theta, eta, alpha, weights):
        logarithms = list(weights)
        for t in range(T):
            W = [log.softmax(-1) for log in logarithms]
            grad = gradients(W, k[t], lambda y, t=t: 2 * (y - v[t]))
            logarithms = [(1 - alpha[t]) * log - theta[t] * g for log, g in zip(logarithms, grad)]
            yield network([log.softmax(-1) for log in logarithms], q[t])

    check(MirasConfig.memora, lambda *a: list(memora(*a)))


def test_anchored_forgets_towards_the_initial_weights():
    """At C = 1: A_t = (1 - α) A_{t-1} + α A_0 + S_t, then every row at its norm in A_0."""

    def preset(architecture):
        return MirasConfig(architecture=architecture, retention="anchored")

    def anchored(q, k, v, theta, eta, alpha, weights):
        M = list(weights)
        S = [torch.zeros_like(w) for w in M]
        for t in range(T):
            grad = gradients(M, k[t], lambda y, t=t: 2 * (y - v[t]))
            S = [eta[t] * s - theta[t] * g for s, g in zip(S, grad)]
            M = [(1 - alpha[t]) * m + alpha[t] * first + s for m, first, s in zip(M, weights, S)]
            M = [m * first.norm(dim=1, keepdim=True) / m.norm(dim=1, keepdim=True) for m, first in zip(M, weights)]
            yield network(M, q[t])

    check(preset, lambda *problem: list(anchored(*problem)))
