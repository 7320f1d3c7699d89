"""The four choices together, and the named rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny

from titans.miras.algorithm import Algorithm, Momentum
from titans.miras.bias import L2, Bias
from titans.miras.networks import MLP, Network
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
        """The rule of Titans Eqs. 8-14, verbatim; ``architecture`` overrides the network, which the paper leaves open."""
        return cls(architecture=architecture or MLP(), retention=WeightDecay())
