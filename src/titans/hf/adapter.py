"""`TitansForCausalLM`: a titans model as a transformers model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from titans.files import write_whole
from titans.hf.cache import TitansCache
from titans.hf.config import TitansHFConfig
from titans.layers.module import reset
from titans.models import ModelState, TitansModel, build_model
from titans.models.folder import PREFIX, SHIM, SHIM_TEXT

# What tools of transformers pass along, and what there is nothing to do with: tokens have no types here, and where a
# row stands is in its state.
UNUSED = {"token_type_ids", "cache_position", "tokenizer"}


@dataclass
class TitansHFOutput(ModelOutput):
    """What `TitansForCausalLM` returns.

    Args:
        loss: mean cross entropy of the shifted labels, scalar; None without labels.
        logits: ``[B, T, V]``.
        past_key_values: the cache after the last token; None with ``use_cache=False``.
        hidden_states: the residual stream ``[B, T, d_model]`` before each block and what the head reads, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def state(self) -> ModelState | None:
        """The `ModelState` after the last token; pass it back to go on from there."""
        return None if self.past_key_values is None else self.past_key_values.state


class TitansForCausalLM(PreTrainedModel, GenerationMixin):
    """A titans model (attribute ``model``) behind transformers' doors, its state as the cache."""

    config_class = TitansHFConfig
    base_model_prefix = PREFIX.rstrip(".")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _supports_sdpa = True
    _is_stateful = True  # no cropping, so no assisted decoding
    _no_split_modules = ["Block"]  # noqa: RUF012  transformers reads these
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TitansHFConfig):
        super().__init__(config)
        self.model: TitansModel = build_model(config.core())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        store_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: TitansCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> TitansHFOutput | tuple[Any, ...]:
        """Run the model; see `titans.models.TitansModel` for the arguments of both.

        Args:
            attention_mask: ``[B, T]``, or longer: of a mask over the whole text the last T columns are taken.
            past_key_values: the cache to go on from, which is brought up to date; instead of ``state``.
            use_cache: return the cache (default) or leave it out.
            return_dict: False for a tuple.
            others: what ``UNUSED`` names, which changes nothing.

        Raises:
            ValueError: what `TitansModel` refuses, a state and a cache together, or a cache of another kind.
            TypeError: any other argument.
        """
        self._check(state, past_key_values, others)
        columns = next((x.shape[1] for x in (input_ids, inputs_embeds) if x is not None), 0)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -columns:]
        cache = TitansCache(state) if past_key_values is None else past_key_values
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        out = self.model(
            input_ids,
            labels=labels,
            attention_mask=attention_mask,
            state=cache.state,
            store_mask=store_mask,
            document_ids=document_ids,
            logits_to_keep=logits_to_keep,
            inputs_embeds=inputs_embeds,
            output_hidden_states=bool(hidden),
            num_items_in_batch=num_items_in_batch,
        )
        cache.read(out.state, columns)
        keep = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        result = TitansHFOutput(out.loss, out.logits, cache if keep else None, out.hidden_states)
        named = self.config.return_dict if return_dict is None else return_dict
        return result if named else result.to_tuple()

    def _check(self, state: Any, cache: Any, others: Mapping[str, Any]) -> None:
        for name, value in others.items():
            if value is not None and value is not False and name not in UNUSED:
                hint = ": rows stand where state and attention_mask say" if name == "position_ids" else ""
                raise TypeError(f"TitansForCausalLM takes no {name}{hint}, got {type(value).__name__}")
        if cache is not None and not isinstance(cache, TitansCache):
            raise ValueError(f"past_key_values must be a TitansCache, got {type(cache).__name__}")
        if cache is not None and state is not None:
            raise ValueError("give state or past_key_values, got both")

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, state: ModelState | None = None, **kwargs: Any):
        """transformers' ``generate``, whose every step costs the same time and memory.

        Args:
            inputs: ``[B, T]``; all of the text so far where ``past_key_values`` is given, only what follows ``state``.
            state: what has been read before, which stays as it is.
        """
        if state is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("give state or past_key_values, got both")
            kwargs["past_key_values"] = TitansCache(state)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ):
        if next_sequence_length is not None and next_sequence_length < 1:
            read = kwargs["past_key_values"].get_seq_length()
            raise ValueError(
                f"input_ids must go on after the {read} tokens of past_key_values, got {input_ids.shape[1]}: give the "
                "whole text so far, or state= and what follows it"
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any):
        """Beams and several samples: as many rows of the caller's cache, which is left as it is."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, TitansCache) and cache.state is not None and expand_size > 1:
            rows = [row for row in range(cache.state.rows) for _ in range(expand_size)]
            kwargs["past_key_values"] = cache.select(rows)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """transformers' own, but weights that are missing or left over are an error, not a warning.

        Raises:
            ValueError: the folder's tensors are not those of its configuration.
        """
        model, told = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what in ("missing_keys", "unexpected_keys"):
            if names := sorted(told[what]):
                raise ValueError(f"{args[0] if args else 'model folder'}: {what.replace('_', ' ')} {', '.join(names)}")
        if hasattr(model, "hf_device_map") and any(p.is_meta for p in model.parameters()):
            raise ValueError("device_map: parts cannot be offloaded, since layers read parameters of modules in them")
        return (model, told) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The one folder format, see `titans.models.folder`; arguments as transformers has them."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            write_whole(Path(save_directory) / SHIM, lambda aside: aside.write_text(SHIM_TEXT, encoding="utf-8"))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: every folder has a file that leads to this class."""

    def _init_weights(self, module: nn.Module) -> None:
        """Start a new embedding or head; everything else `build_model` has initialised."""
        if isinstance(module, (nn.Embedding, nn.Linear)) and not module.weight.is_meta:
            reset(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value
        size = {"vocab_size": value.weight.shape[0]}
        self.model.config = self.model.config.model_copy(update=size).frozen()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute each block in the backward pass; how transformers would do it does not matter."""
        self.model.config.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.config.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.model.config.gradient_checkpointing


def register() -> None:
    """Make the Auto classes know ``model_type: titans``; calling it again changes nothing."""
    AutoConfig.register(TitansHFConfig.model_type, TitansHFConfig, exist_ok=True)
    AutoModelForCausalLM.register(TitansHFConfig, TitansForCausalLM, exist_ok=True)
