"""The three configurations, field by field: each acts, or takes one value and says why."""

from __future__ import annotations

from enum import Enum
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from titans.miras import MLP, GradientDescent, Matrix, MirasConfig, Momentum
from titans.models import TitansConfig
from titans.models.config import CheckedModel

MLP_ARGUMENTS = ("depth", "expansion_factor")


def _only(default: Any, why: str, *also: Any) -> Any:
    """A field that takes its default, and the values ``also`` that ask for what happens anyway."""
    return Field(default, description=why, json_schema_extra={"accepted": [default, *also]})


def _refuse(field: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{field} = {value!r} is refused: {why}")


class _Config(CheckedModel):
    @field_validator("*")
    @classmethod
    def _only_accepted(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(field.json_schema_extra, dict) and value not in field.json_schema_extra["accepted"]:  # type: ignore[operator]
            raise _refuse(str(info.field_name), value, str(field.description))
        return value


class MIRASArchitecture(str, Enum):
    """Which memory rule: original Titans, or one of the three models of the MIRAS paper."""

    DEFAULT = "default"
    YAAD = "yaad"
    MONETA = "moneta"
    MEMORA = "memora"


class MemoraNormalizeMode(str, Enum):
    """How MEMORA's weights are normalised; only SOFTMAX, the paper's, is there."""

    SOFTMAX = "softmax"
    L1 = "l1"
    L2 = "l2"


class MIRASConfig(_Config):
    """The memory rule. A field whose name begins with a variant speaks for that variant alone.

    Attributes:
        architecture: DEFAULT is ``titans.MirasConfig.titans()``, not this library's own default ``steady()``, since the
            name promises the original Titans rule; YAAD, MONETA and MEMORA are the presets of those names.
        yaad_delta: Huber threshold, > 0.
        moneta_bias_p: exponent p of the ℓp loss, 1 to 16.
        moneta_gate_p: exponent q of the ℓq retention, 1 to 8.
        memora_temperature: τ > 0 in W = softmax(A / τ), A being what the memory accumulates.
        memora_normalize_mode: SOFTMAX (the original's default is L2, which its paper does not have).
    """

    architecture: MIRASArchitecture = MIRASArchitecture.DEFAULT
    yaad_delta: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    moneta_bias_p: float = Field(default=1.5, ge=1, le=16)
    moneta_gate_p: float = Field(default=1.5, ge=1, le=8)
    moneta_regularization_weight: float = _only(
        0.01, "the ℓq retention is computed in full (MIRAS Eq. 24), so there is no weight to blend it in with"
    )
    memora_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    memora_normalize_mode: MemoraNormalizeMode = MemoraNormalizeMode.SOFTMAX

    @model_validator(mode="after")
    def _softmax(self) -> MIRASConfig:
        mode = self.memora_normalize_mode
        if self.architecture is MIRASArchitecture.MEMORA and mode is not MemoraNormalizeMode.SOFTMAX:
            raise _refuse(
                "memora_normalize_mode",
                mode.value,
                "Memora's rows are probabilities by a softmax (MIRAS Eq. 27); for rows of constant ℓ2 norm take "
                "titans.MirasConfig(retention='anchored')",
            )
        return self

    @property
    def temperature(self) -> float:
        return self.memora_temperature if self.architecture is MIRASArchitecture.MEMORA else 1.0

    def to_titans(self, network: MLP | Matrix, momentum: bool | None) -> MirasConfig:
        """The same as ``titans`` writes it; ``memora_temperature`` acts elsewhere (``TransformerConfig.to_titans``)."""
        if self.architecture is MIRASArchitecture.YAAD:
            rule = MirasConfig.yaad(self.yaad_delta, network)
        elif self.architecture is MIRASArchitecture.MONETA:
            rule = MirasConfig.moneta(self.moneta_bias_p, self.moneta_gate_p, network)
        elif self.architecture is MIRASArchitecture.MEMORA:
            rule = MirasConfig.memora(architecture=network)
        else:
            rule = MirasConfig.titans(network)
        if momentum is None:
            return rule
        return rule.model_copy(update={"algorithm": Momentum() if momentum else GradientDescent()})


class NeuralMemoryConfig(_Config):
    """The memory of every layer.

    Attributes:
        dim: None, or ``TransformerConfig.dim``: the memory works at the model's width.
        heads: memory heads; they share the width.
        dim_head: None, or dim / heads.
        depth: maps of the memory network, 1 for a matrix.
        default_model_kwargs: ``depth`` and ``expansion_factor`` (4) of the memory network.
        mem_model_norm_add_residual: memory M(x) = x + LN(f(x)) rather than f(x).
        momentum: past surprise S_t = η_t S_{t-1} - θ_t g_t, on or off; None as the variant says: DEFAULT has it, YAAD,
            MONETA and MEMORA have none in their paper, and are far steadier without.
        max_lr: cap of the step, with momentum of θ / (1 - η), on a loss averaged over a head's channels, as the
            original's is; ``titans`` sums, so its ``theta_max`` is max_lr / (dim / heads), times its rule's
            ``step_scale``. At 1 that is the cap ``titans`` itself takes.
        batch_size, chunk_size, segment_len: the memory's chunk, after which gradients are taken anew, is the first
            that is given (a chunk_size of 1 counts as not given), else ``TransformerConfig.segment_len``. Gates act
            per token whatever it is.
        init_adaptive_step_bias, init_momentum_bias, init_decay_bias: the gate starts as this number's sigmoid, the
            same for every token; None for the start of ``titans``.
        miras: wins over ``TransformerConfig.miras``.
    """

    dim: int | None = Field(default=None, ge=1)
    heads: int = Field(default=1, ge=1)
    dim_head: int | None = Field(default=None, ge=1)
    depth: int = Field(default=2, ge=1, le=16)
    default_model_kwargs: dict[str, float] = Field(default_factory=dict)
    mem_model_norm_add_residual: bool = True
    momentum: bool | None = None
    max_lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(default=None, ge=1)
    chunk_size: int | tuple[int, int] = 1
    segment_len: int | None = Field(default=None, ge=1)
    init_adaptive_step_bias: float | None = Field(default=None, allow_inf_nan=False)
    init_momentum_bias: float | None = Field(default=None, allow_inf_nan=False)
    init_decay_bias: float | None = Field(default=None, allow_inf_nan=False)
    miras: MIRASConfig | None = None
    layers: tuple[int, ...] | None = None

    default_step_transform_max_lr: float = _only(1.0, "max_lr is the one cap of the step: set that")
    pre_rmsnorm: bool = _only(True, "what the memory reads and writes is always normalised first")
    post_rmsnorm: bool = _only(False, "reads are always normalised", True)
    gate_attn_output: bool = _only(False, "the memory always gates the attention output (Titans Eq. 25)", True)
    qk_rmsnorm: bool = _only(False, "queries and keys are always ℓ2-normalised (Titans §4.4), without a learned gain")
    per_head_learned_parameters: bool = _only(True, "every head learns initial weights of its own")
    attn_pool_chunks: bool = _only(False, "gates act per token, nothing is pooled over a chunk")
    per_parameter_lr_modulation: bool = _only(
        False, "for a step size per map and channel take titans.MirasConfig(gates='channel')"
    )
    max_mem_layer_modulation: float = _only(1.0, "it belongs to per_parameter_lr_modulation, which is not offered")
    apply_spectral_norm_surprises: bool = _only(
        False, "for orthogonalised writes take titans.MirasConfig(algorithm='muon')"
    )
    max_grad_norm: float | None = _only(
        None, "inner gradients are not clipped; bound them by MIRASArchitecture.YAAD or by a smaller max_lr"
    )
    momentum_order: int = _only(1, "momentum is of first order (Titans Eq. 10)")
    learned_momentum_combine: bool = _only(False, "there is one order of momentum, so nothing to combine")
    learned_combine_include_zeroth: bool = _only(False, "it belongs to learned_momentum_combine, not offered")
    num_kv_per_token: int = _only(1, "a token writes one key and value")
    accept_weight_residual: bool = _only(False, "each layer's memory stands alone")
    add_value_residual: bool = _only(False, "values of a layer come from that layer alone")
    qkv_receives_diff_views: bool = _only(False, "query, key and value are projections of one input")
    gated_transition: bool = _only(False, "a chunk's end changes no weights, so there is no transition to smooth")
    use_accelerated_scan: bool = _only(False, "the engine is chosen on the model: model.model.set_engine('compiled')")

    @model_validator(mode="before")
    @classmethod
    def _depth_from_kwargs(cls, data: Any) -> Any:
        kwargs = data.get("default_model_kwargs") if isinstance(data, dict) else None
        return {"depth": kwargs["depth"], **data} if isinstance(kwargs, dict) and "depth" in kwargs else data

    @model_validator(mode="after")
    def _one_meaning(self) -> NeuralMemoryConfig:
        kwargs = self.default_model_kwargs
        if unknown := set(kwargs) - set(MLP_ARGUMENTS):
            raise _refuse("default_model_kwargs", kwargs, f"unknown {sorted(unknown)}; known: {MLP_ARGUMENTS}")
        if kwargs.get("depth", self.depth) != self.depth:
            raise _refuse("default_model_kwargs", kwargs, f"it contradicts depth = {self.depth}")
        if isinstance(self.chunk_size, tuple) and self.chunk_size[0] != self.chunk_size[1]:
            raise _refuse("chunk_size", self.chunk_size, "reads act per token, so one number says it all")
        if self.updates < 1:
            raise _refuse("chunk_size", self.chunk_size, "at least 1")
        if self.updates > 1 and self.segment_len not in (None, self.updates):
            raise _refuse("segment_len", self.segment_len, f"it contradicts chunk_size = {self.chunk_size}")
        _ = self.network
        return self

    @property
    def updates(self) -> int:
        return self.chunk_size if isinstance(self.chunk_size, int) else self.chunk_size[0]

    @property
    def network(self) -> MLP | Matrix:
        """The memory network as ``titans`` writes it."""
        residual, expansion = self.mem_model_norm_add_residual, self.default_model_kwargs.get("expansion_factor")
        if self.depth > 1:
            return MLP(depth=self.depth, expansion=4 if expansion is None else expansion, residual_norm=residual)
        if expansion not in (None, 4):
            raise _refuse("default_model_kwargs", self.default_model_kwargs, "depth = 1 has no hidden layer to expand")
        return Matrix(residual_norm=residual)

    def chunk(self, segment_len: int) -> int:
        """The memory's chunk, which ends with the segment.

        Raises:
            ValueError: it does not divide ``segment_len``.
        """
        named = {"batch_size": self.batch_size, "chunk_size": self.updates if self.updates > 1 else None}
        named["segment_len"] = self.segment_len
        name, size = next(((n, v) for n, v in named.items() if v), ("segment_len", segment_len))
        if segment_len % size:
            why = f"the memory's chunk must divide TransformerConfig.segment_len = {segment_len}, since each segment"
            raise _refuse(f"neural_mem.{name}", size, f"{why} reads the memory as the previous one left it")
        return size


class TransformerConfig(_Config):
    """A Memory-as-Context transformer.

    Attributes:
        num_tokens: vocabulary size.
        dim: width.
        depth: number of layers, each with a memory.
        segment_len: attention block; the memory is read for each as the previous one left it.
        neural_mem: the memory.
        miras: the memory's rule, unless ``neural_mem.miras`` is given.
        heads: attention heads; they share the width.
        dim_head: None, or dim / heads.
        ff_mult: width of the feed-forward, as a multiple of dim in its two-matrix equivalent.
        num_longterm_mem_tokens: reads of the memory with learned queries, put before each segment.
        num_persist_mem_tokens: learned tokens that every segment sees.
    """

    num_tokens: int = Field(ge=1)
    dim: int = Field(ge=1)
    depth: int = Field(ge=1)
    segment_len: int = Field(ge=1)
    neural_mem: NeuralMemoryConfig = Field(default_factory=NeuralMemoryConfig)
    miras: MIRASConfig = Field(default_factory=MIRASConfig)
    heads: int = Field(default=8, ge=1)
    dim_head: int | None = Field(default=None, ge=1)
    ff_mult: float = Field(default=4, gt=0)
    num_longterm_mem_tokens: int = Field(default=0, ge=0)
    num_persist_mem_tokens: int = Field(default=0, ge=0)

    num_residual_streams: int = _only(4, "there is one residual stream, without hyper-connections", 1)
    use_flex_attn: bool = _only(False, "attention runs on torch's scaled_dot_product_attention")
    use_sliding_window_attn: bool = _only(
        False, "Memory as Context attends by segments; for a sliding window take titans.TitansMAG or TitansMAL(window=)"
    )

    @model_validator(mode="after")
    def _fits(self) -> TransformerConfig:
        memory = self.neural_mem
        for prefix, part in (("", self), ("neural_mem.", memory)):
            if self.dim % part.heads:
                raise _refuse(f"{prefix}heads", part.heads, f"it must divide dim = {self.dim}")
            if part.dim_head not in (None, self.dim // part.heads):
                raise _refuse(f"{prefix}dim_head", part.dim_head, f"{part.heads} heads share dim = {self.dim}")
        if memory.dim not in (None, self.dim):
            raise _refuse("neural_mem.dim", memory.dim, f"the memory works at TransformerConfig.dim = {self.dim}")
        if memory.layers is not None and sorted(memory.layers) != list(range(1, self.depth + 1)):
            raise _refuse("neural_mem.layers", memory.layers, f"all layers 1 to {self.depth} have a memory")
        rule = self.to_titans().rule
        if memory.init_momentum_bias is not None and not rule.algorithm.momentum:
            raise _refuse("neural_mem.init_momentum_bias", memory.init_momentum_bias, "this memory has no momentum")
        return self

    @property
    def rule(self) -> MIRASConfig:
        """The MIRAS configuration that counts: the inner one where given."""
        return self.neural_mem.miras or self.miras

    def to_titans(self) -> TitansConfig:
        """The same model as ``titans`` describes it, but for what ``MACTransformer`` does to starting values.

        Dividing Memora's A by a temperature is, exactly, to divide its steps and its A_0: the first happens here.
        """
        memory = self.neural_mem
        rule = self.rule.to_titans(memory.network, memory.momentum)
        return TitansConfig(
            variant="MAC",
            vocab_size=self.num_tokens,
            d_model=self.dim,
            n_layers=self.depth,
            n_heads=self.heads,
            mem_heads=memory.heads,
            n_persistent=self.num_persist_mem_tokens,
            n_memory_tokens=self.num_longterm_mem_tokens,
            ffn_mult=self.ff_mult,
            chunk_size=memory.chunk(self.segment_len),
            segment_len=self.segment_len,
            miras=rule,
            theta_max=memory.max_lr * rule.step_scale * memory.heads / self.dim / self.rule.temperature,
            tie_embeddings=False,
        )
