"""A bias, a retention gate, a network and an algorithm of one's own: defining the class registers it under its name.

From then on the name works in configurations and JSON files, in every engine and in every model. The tests of this
library import this file, so the four members below also go through all of its engine tests.
"""

from typing import ClassVar

import torch

from titans.miras import Algorithm, Bias, MirasConfig, Network, Retention


class LogCosh(Bias):
    """ℓ = Σ log cosh(r): quadratic near zero, linear far away, and smooth in between."""

    name: ClassVar[str] = "log_cosh"
    width: float = 1.0  # a field is an argument, and part of the JSON

    def error(self, residual, delta=None):
        return self.width * torch.tanh(residual / self.width)


class TanhRetention(Retention):
    """W = tanh(A): no weight leaves (-1, 1)."""

    name: ClassVar[str] = "tanh"
    inside: ClassVar[str] = "hidden"  # writes live in A, so a read sees them from the next chunk on

    def project(self, accumulated, anchor):
        return accumulated.tanh()


class Bilinear(Network):
    """f(x) = W_3 (W_1 x ⊙ W_2 x): a gated network without an activation."""

    name: ClassVar[str] = "bilinear"

    def shapes(self, width):
        return (2 * width, width), (2 * width, width), (width, 2 * width)

    def forward(self, x, apply):
        return apply(2, apply(0, x) * apply(1, x))

    def errors(self, error, outputs, transpose):
        hidden = transpose(2, error)
        return hidden * outputs[1], hidden * outputs[0], error


class Normalised(Algorithm):
    """Every chunk writes its momentum at one length, however large the gradients were."""

    name: ClassVar[str] = "normalised"
    momentum: ClassVar[bool] = True
    per_chunk: ClassVar[bool] = True

    def update(self, momentum):
        return momentum / torch.linalg.vector_norm(momentum, dim=(1, 2), keepdim=True).clamp(min=1e-12)


if __name__ == "__main__":
    from titans import NeuralMemory

    torch.manual_seed(0)
    x = torch.randn(2, 100, 64)
    for choice in (
        {"bias": LogCosh(width=0.5)},
        {"retention": "tanh"},
        {"architecture": {"name": "bilinear", "residual_norm": True}},
        {"algorithm": "normalised", "retention": "weight_decay"},
    ):
        miras = MirasConfig(**choice)
        assert MirasConfig.model_validate_json(miras.model_dump_json()) == miras
        y, state = NeuralMemory(64, n_heads=2, chunk_size=16, miras=miras)(x, return_state=True)
        print(f"{next(iter(choice)):12} {next(iter(choice.values()))!r:58} y {tuple(y.shape)}")
