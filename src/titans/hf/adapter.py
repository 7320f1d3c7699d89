"""`TitansForCausalLM`: a titans model as a transformers ``PreTrainedModel``."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from titans.models import ModelState, TitansConfig, TitansModel, build_model
from titans.models.semantics import SEMANTICS, check_semantics


class TitansHFConfig(PretrainedConfig):
    """transformers' view of a `TitansConfig`, which it keeps whole under ``titans``.

    Args:
        titans: a `TitansConfig` or its dictionary; None for the defaults.
        kwargs: transformers' own fields.
    """

    model_type = "titans"

    def __init__(self, titans: TitansConfig | dict[str, Any] | None = None, **kwargs):
        core = titans if isinstance(titans, TitansConfig) else TitansConfig.model_validate(titans or {})
        self.titans = core.to_dict()
        for derived in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(derived, None)
        self.vocab_size = core.vocab_size
        self.hidden_size = core.d_model
        self.num_hidden_layers = core.n_layers
        self.num_attention_heads = core.attention_heads
        kwargs["tie_word_embeddings"] = core.tie_embeddings
        kwargs["semantics"] = SEMANTICS
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """What ``from_pretrained`` reads a config.json with.

        Raises:
            ValueError: its model was trained when the same configuration and weights computed something else.
        """
        check_semantics(config_dict.get("semantics"), "config.json")
        return super().from_dict(config_dict, **kwargs)

    def core(self) -> TitansConfig:
        """The `TitansConfig` the model is built from."""
        return TitansConfig.model_validate(self.titans)


@dataclass
class TitansHFOutput(ModelOutput):
    """What `TitansForCausalLM` returns.

    Args:
        loss: mean cross entropy of the shifted labels, scalar; None without labels.
        logits: ``[B, T, V]``.
        state: the `ModelState` after the last token; pass it back to go on from there.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: ModelState | None = None


class TitansForCausalLM(PreTrainedModel):
    """A titans model (attribute ``model``) with transformers' saving, loading and Auto classes around it."""

    config_class = TitansHFConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False  # TitansConfig.gradient_checkpointing switches it on
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012  transformers reads it

    def __init__(self, config: TitansHFConfig):
        super().__init__(config)
        self.model: TitansModel = build_model(config.core())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave a module alone: `build_model` has initialised it."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        state: ModelState | None = None,
        store_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> TitansHFOutput:
        """Run the model; see `titans.models` for the arguments (``[B, T]``, labels shifted inside, -100 ignored)."""
        out = self.model(
            input_ids,
            labels=labels,
            attention_mask=attention_mask,
            state=state,
            store_mask=store_mask,
            document_ids=document_ids,
            logits_to_keep=logits_to_keep,
        )
        return TitansHFOutput(loss=out.loss, logits=out.logits, state=out.state)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        attention_mask: torch.Tensor | None = None,
        state: ModelState | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The model's own generation, in constant time and memory per token; ``[B, T] -> [B, T + new]``."""
        return self.model.generate(
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            attention_mask=attention_mask,
            state=state,
            generator=generator,
        )


def register() -> None:
    """Make the Auto classes know ``model_type: titans``; calling it again changes nothing."""
    AutoConfig.register(TitansHFConfig.model_type, TitansHFConfig, exist_ok=True)
    AutoModelForCausalLM.register(TitansHFConfig, TitansForCausalLM, exist_ok=True)
