"""`TitansForCausalLM` and `TitansHFModel`: a titans model as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from titans.hf.config import TitansHFConfig
from titans.layers.module import reset
from titans.models import ModelState, TitansModel, build_model
from titans.models.cache import TitansCache
from titans.models.folder import CONFIG, PREFIX, SHIM, SHIM_TEXT, check_digest, save_folder
from titans.names import path_of

# What tools pass along though nothing depends on it: tokens have no types, and where a row stands is in its state.
UNUSED = {"token_type_ids", "cache_position", "tokenizer"}


@dataclass
class TitansHFOutput(ModelOutput):
    """A `titans.models.ModelOutput`, its state in a cache; of `TitansHFModel` what the head would read, no logits."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    state = property(lambda self: getattr(self.past_key_values, "state", None))  # after the last token, to go on from


class Whole:
    """To stand before a class of transformers': folders hold every tensor, and the file that leads back here."""

    shim = SHIM_TEXT
    register_for_auto_class = TitansHFConfig.register_for_auto_class
    _get_files_timestamps = lambda self, folder: {}  # noqa: E731  with push_to_hub all of the folder goes up

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """transformers' own, but weights that are missing, left over, or not what was saved are a ValueError."""
        model, told = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if hasattr(model, "hf_device_map") and any(p.is_meta for p in model.parameters()):
            raise ValueError("device_map: parts cannot be offloaded, since layers read parameters of modules in them")
        for what in (
            "missing_keys",
            "unexpected_keys",
            "mismatched_keys",
        ):  # of the last, transformers gives shapes too
            if names := sorted(key if isinstance(key, str) else key[0] for key in told[what]):
                raise ValueError(f"{path}: {what.replace('_', ' ')} {', '.join(names)}")
        folder = Path(path or "", kwargs.get("subfolder") or "")
        if (folder / CONFIG).is_file():  # else a name on the hub, or weights that were given
            check_digest(folder)
        return (model, told) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """The one folder format, see `titans.models.folder.save_folder`; arguments as transformers has them."""
        save = super().save_pretrained  # type: ignore[misc]

        def write(aside: Path) -> None:
            aside.mkdir()
            (aside / SHIM).write_text(self.shim, encoding="utf-8")
            save(str(aside), **kwargs)

        if is_main_process and not kwargs.get("distributed_checkpoint"):
            save_folder(path_of("save_directory", save_directory), write)
        else:  # helps to gather what the main process writes
            save(save_directory, is_main_process=is_main_process, **kwargs)


class TitansForCausalLM(Whole, PreTrainedModel, GenerationMixin):
    """A titans model (attribute ``model``) behind transformers' doors, its state as the cache."""

    config_class = TitansHFConfig
    base_model_prefix = PREFIX.rstrip(".")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _supports_sdpa = True
    _input_embed_layer = "embedding"
    _is_stateful = True  # no cropping, so no assisted decoding
    _no_split_modules = ["Block"]  # noqa: RUF012  transformers reads these
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _supports_default_dynamic_cache = classmethod(lambda cls: False)  # type: ignore  # the first call makes our own

    def __init__(self, config: TitansHFConfig):
        super().__init__(config)
        self.model: TitansModel = build_model(config.core())
        self.apply(lambda module: setattr(module, "_is_hf_initialized", True))  # started: not to be drawn again
        self.post_init()

    def forward(  # the names and order of TitansModel.forward, then transformers' own
        self, input_ids: Tensor | None = None, *, labels: Tensor | None = None, attention_mask: Tensor | None = None,
        state: ModelState | None = None, store_mask: Tensor | None = None, document_ids: Tensor | None = None,
        logits_to_keep: int = 0, inputs_embeds: Tensor | None = None, output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None, past_key_values: TitansCache | None = None,
        use_cache: bool | None = None, return_dict: bool | None = None, **others: Any,
    ) -> TitansHFOutput | tuple[Any, ...]:  # fmt: skip
        """Run the model; see `titans.models.TitansModel` for the arguments of both.

        Args:
            attention_mask: ``[B, T]``, or longer: of a mask over the whole text the last T columns are taken.
            past_key_values: the cache to go on from; instead of ``state``.
            use_cache, return_dict: False to leave the cache out, and as it was, and for a tuple.
            others: what ``UNUSED`` names, which changes nothing.

        Raises:
            ValueError: what `TitansModel` refuses, a state and a cache together, or a cache of another kind.
            TypeError: any other argument.
        """
        if wrong := [n for n, value in others.items() if n not in UNUSED and value is not None and value is not False]:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(wrong)}")
        if state is not None and past_key_values is not None:
            raise ValueError("give state or past_key_values, got both")
        cache = TitansCache(state) if past_key_values is None else past_key_values
        if not isinstance(cache, TitansCache):
            raise ValueError(f"past_key_values must be a TitansCache (no prefix tuning), got {type(cache).__name__}")
        columns = next((x.shape[1] for x in (input_ids, inputs_embeds) if x is not None), 0)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -columns:]
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        headless = not self.can_generate()
        out = self.model(
            input_ids, labels=labels, attention_mask=attention_mask, state=cache.state, store_mask=store_mask,
            document_ids=document_ids, logits_to_keep=1 if headless else logits_to_keep, inputs_embeds=inputs_embeds,
            output_hidden_states=bool(hidden) or headless, num_items_in_batch=num_items_in_batch,
        )  # fmt: skip
        keep = cache if (self.config.use_cache if use_cache is None else use_cache) else None
        if keep is not None:
            cache.state, cache.columns = out.state, cache.columns + columns
        read = (None, out.hidden_states[-1]) if headless else (out.logits, None)
        result = TitansHFOutput(out.loss, *read, keep, out.hidden_states if hidden else None)
        return result.to_tuple() if return_dict is False or not self.config.return_dict else result

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, state: ModelState | None = None, **kwargs: Any) -> Any:
        """transformers' ``generate``, whose every step costs the same time and memory.

        Args:
            inputs: ``[B, T]``; all of the text so far where ``past_key_values`` is given, only what follows ``state``.
            state: what has been read before, which stays as it is.

        Raises:
            ValueError: a row ends in padding: transformers would go on from there, not from the row's last token; a
                mask that is not of the inputs; a state and a cache together.
        """
        if not self.can_generate():
            raise TypeError(f"{type(self).__name__} has no head to generate with: take AutoModelForCausalLM")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, -1].all():
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"attention_mask: row {row} ends in padding, generate needs it on the left")
        read = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if isinstance(mask, Tensor) and isinstance(read, Tensor) and mask.shape[:2] != read.shape[:2]:
            raise ValueError(f"attention_mask must be of {list(read.shape[:2])} tokens, got {list(mask.shape)}")
        if state is not None and not isinstance(state, ModelState):
            raise ValueError(f"state must be a ModelState, got {type(state).__name__}")
        if state is not None and kwargs.get("past_key_values") is not None:
            raise ValueError("give state or past_key_values, got both")
        held = {} if state is None else {"past_key_values": TitansCache(state)}
        return super().generate(inputs, *args, **{**kwargs, **held})  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.columns and not kwargs.get("use_cache", True):
            raise ValueError("past_key_values: use_cache=False reads the whole text at every step, give state= instead")
        length, places = kwargs.get("next_sequence_length"), kwargs.get("cache_position")  # either, by the release
        if (length is not None and length < 1) or (places is not None and not len(places)):
            raise ValueError(
                f"input_ids must be the whole text so far, more than the {kwargs['past_key_values'].columns} tokens of "
                f"past_key_values, got {input_ids.shape[1]}; or give state= and what follows it"
            )
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: the cache is the model's constant state, None, got {kind!r}")
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        """Beams and several samples: as many rows of the caller's cache, which is left as it is."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.state is not None:
            kwargs["past_key_values"] = TitansCache(cache.state.fork(expand_size), cache.columns)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:  # of a new embedding or head
        if isinstance(module, (nn.Embedding, nn.Linear)) and not module.weight.is_meta:
            reset(module)

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embedding = value
        self.model._config = self.model.config.model_copy(update={"vocab_size": value.weight.shape[0]}).frozen()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers has it; a ValueError for a vocabulary that no model can have, which is left as it was."""
        if new_num_tokens is not None and (not isinstance(new_num_tokens, int) or new_num_tokens < 1):
            raise ValueError(f"new_num_tokens must be an integer of at least 1, got {new_num_tokens!r}")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `Whole.save_pretrained`; a ValueError where ``config`` says what the built model does not compute."""
        self.config.core().check_built(self.model.config)
        super().save_pretrained(save_directory, is_main_process, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.head = new_embeddings

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:  # by block; how they would, is no matter
        self.model.config.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.config.gradient_checkpointing = False

    is_gradient_checkpointing = is_activation_checkpointing = property(lambda m: m.model.config.gradient_checkpointing)  # type: ignore


class TitansHFModel(TitansForCausalLM):
    """What ``AutoModel`` gives: the same model and folder; a call returns ``last_hidden_state`` instead of logits."""

    can_generate = classmethod(lambda cls: False)  # type: ignore[assignment]
