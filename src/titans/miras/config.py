"""The four choices together, and the named rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny

from titans.miras.algorithm import Algorithm, GradientDescent, Momentum
from titans.miras.bias import L2, Bias
from titans.miras.networks import MLP, GatedMLP, Matrix, Network
from titans.miras.retention import Retention, SphereRetention, WeightDecay


class MirasConfig(BaseModel):
    """Which memory to compute: architecture, attentional bias, retention gate, memory algorithm (MIRAS §4).

    Each field takes a member object, its name (``"sphere"``) or a mapping (``{"name": "mlp", "depth": 3}``). Without
    arguments this is :meth:`steady`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Annotated[SerializeAsAny[Network], BeforeValidator(Network.parse)] = MLP()
    bias: Annotated[SerializeAsAny[Bias], BeforeValidator(Bias.parse)] = L2()
    retention: Annotated[SerializeAsAny[Retention], BeforeValidator(Retention.parse)] = SphereRetention()
    algorithm: Annotated[SerializeAsAny[Algorithm], BeforeValidator(Algorithm.parse)] = Momentum()

    @classmethod
    def steady(cls, architecture: Network | None = None) -> MirasConfig:
        """The default of layers and models: the Titans rule with norm-preserving retention; it lasts."""
        return cls(architecture=architecture or MLP())

    @classmethod
    def titans(cls, architecture: Network | None = None) -> MirasConfig:
        """The rule of Titans Eqs. 8-14, verbatim; the paper leaves the network open, ``architecture`` overrides it."""
        return cls(architecture=architecture or MLP(), retention=WeightDecay())


def resolve_miras(
    miras: MirasConfig | None,
    mem_layers: int | None,
    d_hidden: int | None,
    use_momentum: bool | None,
    d_model: int,
    heads: int,
) -> MirasConfig:
    """Apply the shorthands of layers and models to ``miras``.

    Without ``miras`` each shorthand changes that part of ``steady``; against a given ``miras`` that says otherwise it
    is an error.

    Raises:
        ValueError: a shorthand that contradicts ``miras``, or a width that does not divide.
    """
    given, miras = miras is not None, miras or MirasConfig.steady()
    network, algorithm = miras.architecture, miras.algorithm
    if mem_layers is not None and mem_layers != depth(network):
        if given:
            raise ValueError(f"mem_layers = {mem_layers} contradicts miras, whose {network.name} has {depth(network)}")
        if mem_layers < 1:
            raise ValueError(f"mem_layers must be at least 1, got {mem_layers}")
        network = Matrix() if mem_layers == 1 else MLP(depth=mem_layers)
    if d_hidden is not None:
        if d_hidden < heads or d_hidden % heads:
            raise ValueError(f"d_hidden must be a multiple of the {heads} memory heads, got {d_hidden}")
        if not isinstance(network, MLP | GatedMLP):
            raise ValueError(f"d_hidden = {d_hidden} needs a memory with a hidden layer, not {network.name!r}")
        expansion = d_hidden / d_model
        if given and round(network.expansion * d_model / heads) * heads != d_hidden:
            raise ValueError(f"d_hidden = {d_hidden} contradicts miras, whose expansion is {network.expansion}")
        network = network.model_copy(update={"expansion": expansion})
    if use_momentum is not None and use_momentum != algorithm.momentum:
        if given:
            raise ValueError(f"use_momentum = {use_momentum} contradicts miras, whose algorithm is {algorithm.name!r}")
        algorithm = Momentum() if use_momentum else GradientDescent()
    return miras.model_copy(update={"architecture": network, "algorithm": algorithm})


def depth(network: Network) -> int:
    """Maps on the longest path through a memory network."""
    if isinstance(network, MLP):
        return network.depth
    return 2 if isinstance(network, GatedMLP) else 1
