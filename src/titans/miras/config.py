"""The four choices together, and the named rules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, model_validator

from titans.miras.algorithm import Algorithm, GradientDescent, Momentum
from titans.miras.bias import L2, Bias, Huber, Lp
from titans.miras.networks import MLP, GatedMLP, Matrix, Network
from titans.miras.retention import AnchoredRetention, KLRetention, LqRetention, Retention, WeightDecay

GateKind = Literal["head", "channel"]
PRESETS = ("titans", "steady", "yaad", "moneta", "memora")


class MirasConfig(BaseModel):
    """Which memory to compute: architecture, attentional bias, retention gate, memory algorithm (MIRAS §4).

    Each of the four takes a member object, its name (``"anchored"``) or a mapping (``{"name": "mlp", "depth": 3}``).
    ``gates`` says what the step size θ, the forgetting α and a learned δ are numbers of: every token and "head", or
    every token, map and output "channel" (MIRAS §5.3; slower). Momentum decay η is always one number per head.
    Without arguments this is :meth:`steady`. Where a configuration file wants one, the name of a preset will do.

    Raises:
        ValueError: a combination that has no meaning, with the reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Annotated[SerializeAsAny[Network], BeforeValidator(Network.parse)] = MLP()
    bias: Annotated[SerializeAsAny[Bias], BeforeValidator(Bias.parse)] = L2()
    retention: Annotated[SerializeAsAny[Retention], BeforeValidator(Retention.parse)] = AnchoredRetention()
    algorithm: Annotated[SerializeAsAny[Algorithm], BeforeValidator(Algorithm.parse)] = Momentum()
    gates: GateKind = "head"

    @model_validator(mode="before")
    @classmethod
    def _preset_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in PRESETS:
            raise ValueError(f"miras {value!r} is no preset; there are {', '.join(PRESETS)}")
        return dict(getattr(cls, value)())

    @model_validator(mode="after")
    def _means_something(self) -> MirasConfig:
        if self.algorithm.per_chunk and not self.algorithm.momentum:
            raise ValueError(f"algorithm {self.algorithm.name!r} says per_chunk, so it must say momentum too")
        if self.retention.inside not in ("shown", "scaled", "hidden"):
            raise ValueError(
                f"retention {self.retention.name!r} says inside = {self.retention.inside!r}; it must be 'shown', "
                "'scaled' or 'hidden'"
            )
        if self.retention.decays_to_initial and (self.retention.inside != "shown" or self.retention.identity):
            raise ValueError(
                f"retention {self.retention.name!r} says decays_to_initial, so it must say inside = 'shown' and "
                "identity = False"
            )
        if self.algorithm.per_chunk and any(len(shape) == 1 for shape in self.architecture.shapes(4)):
            raise ValueError(
                f"algorithm {self.algorithm.name!r} rotates whole matrices, architecture {self.architecture.name!r} "
                "has a map that is a vector: choose 'gradient_descent' or 'momentum'"
            )
        return self

    @property
    def hides_writes(self) -> bool:
        """Does a read see nothing of a chunk's writes before the chunk is complete?"""
        return self.retention.inside == "hidden" or self.algorithm.per_chunk

    @property
    def step_scale(self) -> float:
        """A layer's default cap of θ times its head width D: 1 for the Titans rule with two maps."""
        return self.architecture.step_scale * self.bias.step_scale * self.retention.step_scale

    @classmethod
    def steady(cls, architecture: Network | None = None) -> MirasConfig:
        """The default of layers and models: the Titans rule with the ``anchored`` retention; it lasts."""
        return cls(architecture=architecture or MLP())

    @classmethod
    def titans(cls, architecture: Network | None = None) -> MirasConfig:
        """The rule of Titans Eqs. 8-14; the paper leaves the network open, ``architecture`` overrides it."""
        return cls(architecture=architecture or MLP(), retention=WeightDecay())

    @classmethod
    def yaad(cls, delta: float | Literal["learned"] = 1.0, architecture: Network | None = None) -> MirasConfig:
        """MIRAS Eq. 26: the Huber mixture shrugs off outliers. ``delta`` > 0 or "learned" per token."""
        return cls(
            architecture=architecture or MLP(),
            bias=Huber(delta=delta, form="mixture"),
            retention=WeightDecay(),
            algorithm=GradientDescent(),
        )

    @classmethod
    def moneta(cls, p: float = 3, q: float = 4, architecture: Network | None = None) -> MirasConfig:
        """MIRAS Eq. 24: an ℓp bias and an ℓq retention."""
        return cls(
            architecture=architecture or MLP(),
            bias=Lp(p=p),
            retention=LqRetention(q=q),
            algorithm=GradientDescent(),
        )

    @classmethod
    def memora(cls, scale: float = 1.0, architecture: Network | None = None) -> MirasConfig:
        """MIRAS Eq. 27: every row of a weight matrix is a probability distribution times ``scale``."""
        return cls(
            architecture=architecture or MLP(),
            retention=KLRetention(scale=scale),
            algorithm=GradientDescent(),
        )


def resolve_miras(
    miras: MirasConfig | str | dict[str, Any] | None,
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
    given = miras is not None
    if not isinstance(miras, MirasConfig):
        if miras is not None and not isinstance(miras, str | dict):
            raise ValueError(f"miras must be a MirasConfig, a mapping or the name of a preset, got {miras!r}")
        miras = MirasConfig.steady() if miras is None else MirasConfig.model_validate(miras)
    network, algorithm = miras.architecture, miras.algorithm
    if mem_layers is not None and mem_layers != network.layers:
        if given:
            raise ValueError(f"mem_layers = {mem_layers} contradicts miras, whose {network.name} has {network.layers}")
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
