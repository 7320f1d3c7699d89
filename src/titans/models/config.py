"""``TitansConfig``: everything a model is built from, validated, with the papers' sizes as presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from titans.layers.gates import default_heads, default_theta_max
from titans.miras import MirasConfig
from titans.miras.config import resolve_miras
from titans.models.registry import MIXERS
from titans.models.yaml_text import parse_yaml
from titans.names import each_key_once, path_of, unknown

MODEL_TYPE = "titans"  # what a model folder's config.json calls itself
FREE = ("gradient_checkpointing", "max_seq_len", "lr")  # what changes nothing that a built model computes
# Widths and heads follow MIRAS App. C; the layers are fitted so that each variant has the named size (within 5 %) at
# 32,000 tokens of vocabulary with tied embeddings.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 384, "n_heads": 6, "mem_heads": 6},
    "small": {"d_model": 768, "n_heads": 16, "mem_heads": 16},
    "medium": {"d_model": 1024, "n_heads": 16, "mem_heads": 16},
    "base400": {"d_model": 1024, "n_heads": 16, "mem_heads": 16},
    "large": {"d_model": 1536, "n_heads": 16, "mem_heads": 16},
}
PRESET_LAYERS: dict[str, dict[str, int]] = {
    "tiny": {"LMM": 8, "MAC": 6, "MAG": 7, "MAL": 7, "transformer": 10, "swa": 10},
    "small": {"LMM": 18, "MAC": 13, "MAG": 14, "MAL": 14, "transformer": 21, "swa": 21},
    "medium": {"LMM": 22, "MAC": 16, "MAG": 17, "MAL": 17, "transformer": 24, "swa": 24},
    "base400": {"LMM": 26, "MAC": 19, "MAG": 20, "MAL": 20, "transformer": 29, "swa": 29},
    "large": {"LMM": 22, "MAC": 16, "MAG": 17, "MAL": 17, "transformer": 25, "swa": 25},
}


class CheckedModel(BaseModel):
    """Base of configurations: unknown keys are errors, True is no number, a refused assignment changes nothing."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = get_args(kind := cls.model_fields[info.field_name or ""].annotation) or (kind,)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("Input should be a number")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign, or leave everything as it was: pydantic's validators of the whole come after the assignment."""
        before, known = dict(self.__dict__), set(self.__pydantic_fields_set__)
        try:
            super().__setattr__(name, value)
        except Exception:
            object.__setattr__(self, "__dict__", before)
            object.__setattr__(self, "__pydantic_fields_set__", known)
            raise


MOST = 2**31 - 1  # of anything that is counted


class TitansConfig(CheckedModel):
    """Configuration of a language model.

    Attributes:
        variant: LMM, MAC, MAG, MAL (Titans §4), or the baselines of the same block design "transformer" (full
            attention) and "swa" (sliding window).
        vocab_size: number of token ids.
        d_model: width.
        n_layers: number of blocks.
        n_heads: attention heads; default the largest that leaves heads at least 64 wide.
        mem_heads: memory heads; default as n_heads' default.
        mem_head_dim: width of a memory head's keys and values; default d_model / mem_heads.
        mem_layers: depth of the memory network, 1 for the matrix memory; default as ``miras`` says.
        d_hidden: total hidden width of the memory networks; default four times that of its heads together.
        n_persistent: persistent tokens per layer.
        n_memory_tokens: MAC: additional memory reads with learned queries per segment.
        ffn_mult: width of the feed-forward, as a multiple of d_model in its two-matrix equivalent.
        chunk_size: the memory's update unit; gradients are taken at its start.
        memory_layers: numbers of the blocks, from 0, that are of ``variant``; the others have sliding-window attention
            alone, as "swa" has. Default: all.
        segment_len: MAC's attention block, a multiple of chunk_size; default chunk_size.
        window: reach of sliding-window attention (MAG, MAL, swa).
        use_momentum: default as ``miras`` says.
        use_decay: forgetting gate on (default) or off.
        miras: the four MIRAS choices; default ``MirasConfig.steady()``.
        theta_max: cap of the step size as :class:`~titans.memory.NeuralMemory` has it; default 1 / head width or less.
        conv_kernel: kernel of the memory's convolutions; 0 for none.
        attention_conv: kernel of the convolution on attention's queries, keys and values; 0 for none.
        attention_induction: keys of attention start as the queries of the token before; needs the convolution.
        qkv_activation: "none" or "silu" in the memory's projections.
        rope_base: base of the rotary angles.
        tie_embeddings: share the input embedding with the output projection.
        gradient_checkpointing: recompute each block in the backward pass.
        max_seq_len: training length of the data; never a limit of the model.
        lr: peak learning rate that training takes unless told otherwise.
    """

    _frozen: bool = PrivateAttr(False)

    variant: str = "MAC"
    vocab_size: int = Field(default=32_000, ge=1, le=MOST)
    d_model: int = Field(default=512, ge=1, le=2**20)
    n_layers: int = Field(default=12, ge=1, le=2**16)
    n_heads: int | None = Field(default=None, ge=1, le=2**20)
    mem_heads: int | None = Field(default=None, ge=1, le=2**20)
    mem_head_dim: int | None = Field(default=None, ge=1, le=2**20)
    mem_layers: int | None = Field(default=None, ge=1, le=16)
    d_hidden: int | None = Field(default=None, ge=1, le=2**26)
    n_persistent: int = Field(default=16, ge=0, le=2**20)
    n_memory_tokens: int = Field(default=0, ge=0, le=2**20)
    ffn_mult: float = Field(default=4, ge=0.01, le=1000, allow_inf_nan=False)
    chunk_size: int = Field(default=128, ge=1, le=MOST)
    memory_layers: tuple[int, ...] | None = None
    segment_len: int | None = Field(default=None, ge=1, le=MOST)
    window: int = Field(default=512, ge=1, le=MOST)
    use_momentum: bool | None = None
    use_decay: bool | None = None
    miras: MirasConfig | None = None
    theta_max: float | None = Field(default=None, gt=0, le=1e6, allow_inf_nan=False)
    conv_kernel: int = Field(default=4, ge=0, le=1024)
    attention_conv: int = Field(default=4, ge=0, le=1024)
    attention_induction: bool = True
    qkv_activation: Literal["none", "silu"] = "none"
    rope_base: float = Field(default=10_000.0, ge=1, le=1e12, allow_inf_nan=False)
    tie_embeddings: bool = True
    gradient_checkpointing: bool = False
    max_seq_len: int = Field(default=4096, ge=1, le=MOST)
    lr: float = Field(default=4e-4, gt=0, le=1000, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_folder(cls, values: Any) -> Any:
        """Of a model folder's config.json take our own fields: transformers keeps its own beside them."""
        if not isinstance(values, dict) or "model_type" not in values:
            return values
        if values["model_type"] != MODEL_TYPE:
            raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {values['model_type']!r}")
        return fields_of_folder(values)

    @field_validator("variant")
    @classmethod
    def _known(cls, variant: str) -> str:
        if variant not in MIXERS:
            raise ValueError(unknown("variant", variant, MIXERS))
        return variant

    @model_validator(mode="after")
    def _fits(self) -> TitansConfig:
        if self.d_model % self.attention_heads:
            raise ValueError(f"n_heads must divide d_model = {self.d_model}, got {self.attention_heads}")
        if self.mem_head_dim is None and self.d_model % self.memory_heads:
            raise ValueError(f"mem_heads must divide d_model = {self.d_model}, got {self.memory_heads}")
        if self.variant == "MAC" and self.segment % self.chunk_size:
            raise ValueError(f"chunk_size must divide segment_len = {self.segment}, got {self.chunk_size}")
        if self.n_memory_tokens and self.variant != "MAC":
            raise ValueError(f"n_memory_tokens belongs to variant MAC, got {self.n_memory_tokens} with {self.variant}")
        if self.memory_layers is not None:
            if not self.has_memory or not set(self.memory_layers) <= set(range(self.n_layers)):
                raise ValueError(
                    f"memory_layers must be among the blocks 0..{self.n_layers - 1} of a variant with a memory, got "
                    f"{self.memory_layers} with {self.variant}"
                )
        _ = self.rule
        return self

    def mixer(self, layer: int) -> str:
        """The variant of a block."""
        return self.variant if self.memory_layers is None or layer in self.memory_layers else "swa"

    def of_block(self, layer: int) -> TitansConfig:
        """What a block's mixer is built from: without what only blocks with a memory have, where it has none."""
        variant = self.mixer(layer)
        without = {"memory_layers": None, "n_memory_tokens": 0} if variant != self.variant else {}
        return self.model_copy(update={"variant": variant, **without})

    @property
    def attention_heads(self) -> int:
        return self.n_heads or default_heads(self.d_model)

    @property
    def memory_heads(self) -> int:
        return self.mem_heads or default_heads(self.d_model)

    @property
    def memory_width(self) -> int:
        """Of all memory heads' keys together."""
        return self.memory_heads * self.mem_head_dim if self.mem_head_dim else self.d_model

    @property
    def segment(self) -> int:
        return self.segment_len or self.chunk_size

    @property
    def rule(self) -> MirasConfig:
        """The memory rule with the shorthands applied."""
        return resolve_miras(
            self.miras, self.mem_layers, self.d_hidden, self.use_momentum, self.memory_width, self.memory_heads
        )

    @property
    def residual_gain(self) -> float:
        """Gain at the start of maps that add to the residual stream, two a block: the sum keeps about unit scale."""
        return (2 * self.n_layers) ** -0.5

    @classmethod
    def preset(cls, size: str, variant: str = "MAC", **changes: Any) -> TitansConfig:
        """The preset ``size`` ("tiny" … "large") of ``variant``, with fields changed by name."""
        if size not in PRESETS:
            raise ValueError(unknown("preset", size, PRESETS))
        if variant not in PRESET_LAYERS[size]:
            raise ValueError(unknown("variant", variant, PRESET_LAYERS[size]))
        fields = {**PRESETS[size], "n_layers": PRESET_LAYERS[size][variant], "variant": variant}
        return cls(**{**fields, **changes})

    @classmethod
    def tiny(cls, variant: str = "MAC", **changes: Any) -> TitansConfig:
        """About 30 M parameters."""
        return cls.preset("tiny", variant, **changes)

    @classmethod
    def small(cls, variant: str = "MAC", **changes: Any) -> TitansConfig:
        """About 170 M parameters."""
        return cls.preset("small", variant, **changes)

    @classmethod
    def medium(cls, variant: str = "MAC", **changes: Any) -> TitansConfig:
        """About 340 M parameters."""
        return cls.preset("medium", variant, **changes)

    @classmethod
    def base400(cls, variant: str = "MAC", **changes: Any) -> TitansConfig:
        """About 400 M parameters."""
        return cls.preset("base400", variant, **changes)

    @classmethod
    def large(cls, variant: str = "MAC", **changes: Any) -> TitansConfig:
        """About 760 M parameters."""
        return cls.preset("large", variant, **changes)

    @property
    def has_memory(self) -> bool:
        """Not one of the baselines."""
        return MIXERS[self.variant].has_memory

    def explicit(self) -> TitansConfig:
        """The same model with the memory's rule and cap of θ spelt out: what a file must say, lest a later default
        change what it means."""
        if not self.has_memory:
            return self
        head_dim = self.memory_width // self.memory_heads
        theta_max = self.theta_max or default_theta_max(self.rule, head_dim, self.chunk_size)
        return self.model_copy(update={"miras": self.rule, "theta_max": theta_max})

    def frozen(self) -> TitansConfig:
        """A copy whose fields cannot be assigned to, but those that a model reads anew at every call, or never."""
        copy = self.model_copy(deep=True)
        copy._frozen = True
        return copy

    def check_built(self, built: TitansConfig) -> None:
        """Raise a ValueError that names the first field in which the model of ``built`` computes something else."""
        has = built.to_dict()
        for name, value in self.to_dict().items():
            if name not in FREE and value != has[name]:
                raise ValueError(f"config.{name}: the model is built with {has[name]!r}, got {value!r}")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> TitansConfig:
        """A copy, with some fields changed, that can be assigned to.

        Raises:
            ValueError: the changed fields are no configuration.
        """
        copy = super().model_copy(update=update, deep=deep)
        if update:
            checked = type(self).model_validate(dict(copy.__dict__))
            object.__setattr__(copy, "__dict__", dict(checked.__dict__))  # "32" is 32 now
        copy._frozen = False
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields and self._frozen and name not in FREE:
            raise ValueError(f"{name}: the model is built, its configuration cannot change, got {value!r}")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        """Do both describe the same model? What a field left to its default means counts, not that it was left."""
        return isinstance(other, TitansConfig) and self.explicit().__dict__ == other.explicit().__dict__

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON would hold them, of the ``explicit`` configuration."""
        return self.explicit().model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TitansConfig:
        return cls.model_validate(values)

    def to_json(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        path_of("path", path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> TitansConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is not JSON, no mapping (both named with the file), or no such configuration.
        """
        file = path_of("path", path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(_mapping(values, path))

    def to_yaml(self, path: str | Path) -> None:
        """Write the configuration as YAML."""
        path_of("path", path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | Path) -> TitansConfig:
        """Read what `to_yaml` wrote, or a hand.

        Raises:
            ValueError: it is not YAML, no mapping (both named with the file), or no such configuration.
        """
        file = path_of("path", path)
        try:
            values = parse_yaml(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls.from_dict(_mapping(values, path))


def fields_of_folder(values: dict[str, Any]) -> dict[str, Any]:
    """Our own fields of a model folder's ``config.json``.

    Raises:
        ValueError: there is something else in their place.
    """
    told = values if values.get("titans") in (None, {}) else values["titans"]  # where older folders kept them
    if not isinstance(told, dict):
        raise ValueError(f"titans must be a mapping of settings, got {told!r:.60}")
    fields = TitansConfig.model_fields
    for name in told:  # no word of transformers' is spelt like a field that the file leaves out
        close = get_close_matches(str(name), set(fields) - set(told), n=1, cutoff=0.8)
        if close and name not in fields:
            raise ValueError(f"{name}: unknown key, did you mean {close[0]!r}?")
    return {name: told[name] for name in fields if name in told}


def _mapping(values: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values
