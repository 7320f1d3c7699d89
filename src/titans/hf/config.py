"""`TitansHFConfig`: a `TitansConfig` as transformers holds it, field by field."""

import sys
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from titans.models import TitansConfig
from titans.models.config import MODEL_TYPE
from titans.models.folder import header, undigested
from titans.models.semantics import check_semantics
from titans.names import suggestion

LORA_TARGETS = ["q", "kv", "qkv", "out"]  # unless told: the projections of attention and memory
# What any configuration of transformers may be told; what generation is told, it passes over.
COMMON = {"use_cache", "attn_implementation", "experts_implementation", "per_layer_config", "quantization_config"}
COMMON |= {n for n in dir(PretrainedConfig) if not callable(getattr(PretrainedConfig, n))}
COMMON |= {*vars(PretrainedConfig()), *vars(GenerationConfig()), *header(), "max_position_embeddings"}


class TitansHFConfig(PretrainedConfig):
    """transformers' view of a `TitansConfig`: the same fields, also under transformers' names for them.

    Args:
        titans: a `TitansConfig` or its dictionary; None: the fields among ``kwargs``, defaults for the others.
        kwargs: fields of `TitansConfig` (``hidden_size`` and the like too), and transformers' own.

    Raises:
        ValueError: a value that `TitansConfig` refuses, or a word that neither it nor transformers knows.
    """

    model_type = MODEL_TYPE
    use_cache = True  # unless told
    max_position_embeddings = 2**30  # no tool shall cut a text; ``max_seq_len`` is the length of training windows
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  the Trainer gathers tensors only
    attribute_map = dict(hidden_size="d_model", num_hidden_layers="n_layers", tie_word_embeddings="tie_embeddings")  # noqa
    num_attention_heads = property(lambda self: self.core().attention_heads)
    # A folder's own file leads to the class: no code is copied there.
    register_for_auto_class = classmethod(lambda cls, auto_class=None: None)  # type: ignore[assignment]

    def __init__(self, titans: TitansConfig | dict[str, Any] | None = None, **kwargs):
        for name, field in {**self.attribute_map, "num_attention_heads": "n_heads"}.items():
            two = kwargs.get(name), kwargs.get(field)
            if None not in two and two[0] != two[1]:
                raise ValueError(f"{name} and {field} are one field, got {two[0]!r} and {two[1]!r}")
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        kwargs.setdefault("n_heads", kwargs.pop("num_attention_heads", None))
        given = {name: kwargs.pop(name) for name in TitansConfig.model_fields if name in kwargs}
        core = titans if isinstance(titans, TitansConfig) else TitansConfig(**{**given, **(titans or {})})
        vars(self).update(core.to_dict())
        wrong = [n for n in kwargs if n not in COMMON and n[0] != "_"]
        if wrong and "transformers_version" not in kwargs:  # else saved: somebody had set them on his configuration
            near = suggestion(wrong[0], {*TitansConfig.model_fields, *self.attribute_map, *COMMON})
            raise ValueError(f"{type(self).__name__} has no field {wrong[0]!r}{near}")
        kwargs.pop("max_position_embeddings", None)
        super().__init__(**{**kwargs, **header()})

    def to_dict(self) -> dict[str, Any]:
        """Every field, and those that tools look for. PEFT asks right before it looks up what LoRA adapts."""
        if (peft := sys.modules.get("peft")) is not None:
            peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MODEL_TYPE, LORA_TARGETS)
        return {**super().to_dict(), "num_attention_heads": self.num_attention_heads}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """What ``from_pretrained`` reads a config.json with; a ValueError where it was made for other semantics."""
        check_semantics(config_dict.get("semantics"), "config.json")
        return super().from_dict({**undigested(config_dict), **TitansConfig.from_dict(config_dict).to_dict()}, **kwargs)

    def core(self) -> TitansConfig:
        """The `TitansConfig` the model is built from."""
        return TitansConfig(**{name: getattr(self, name) for name in TitansConfig.model_fields})
