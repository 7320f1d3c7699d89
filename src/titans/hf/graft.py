"""A neural memory beside chosen layers of a pretrained decoder, behind a gate that starts at zero.

The decoder's weights keep their names; the memories' states ride on its cache, and what moves its rows moves theirs.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PretrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from titans.files import hash_tensors, write_whole
from titans.hf.adapter import Whole
from titans.layers.neural_memory import NeuralMemoryState
from titans.models import TitansConfig
from titans.models.folder import SHIM, undigested
from titans.models.graft import Graft, grafts
from titans.models.semantics import SEMANTICS, check_semantics
from titans.names import check_kind, path_of

# Where a model of this type keeps its decoder, and the decoder its layers. Add a line for a family of your own.
FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model", "layers")),
    "gpt2": ("transformer", "h"),
}
NAME, FIELD, STORE, WEIGHTS = "titans_memory", "titans_graft", "titans_store_mask", "titans_graft.safetensors"


def _moved(name: str, change: Callable[..., NeuralMemoryState]) -> Any:
    """The cache's own method of that name, the memories changed along with it."""

    def method(self: Any, *args: Any) -> None:
        getattr(super(Remembering, self), name)(*args)
        self.memories = {layer: change(state, *args) for layer, state in self.memories.items()}

    return method


class Remembering:
    """What a cache of transformers becomes that also carries the states of memories, by layer."""

    memories: dict[int, NeuralMemoryState]
    reorder_cache = _moved("reorder_cache", NeuralMemoryState.select)
    batch_select_indices = _moved("batch_select_indices", NeuralMemoryState.select)
    batch_repeat_interleave = _moved("batch_repeat_interleave", NeuralMemoryState.fork)
    reset = _moved("reset", lambda state: state.reset(range(state.rows)))

    def crop(self, *args: Any) -> None:
        raise ValueError("a cache with memories cannot be cropped: a memory cannot unread")


def memories(past_key_values: Any) -> dict[int, NeuralMemoryState]:
    """The memories' states on a cache, by layer; those put into a new cache go on without its keys and values."""
    check_kind("past_key_values", past_key_values, Cache, "a cache of transformers")
    if not isinstance(past_key_values, Remembering):
        past_key_values.__class__ = _with(Remembering, type(past_key_values))
        past_key_values.memories = {}
    return past_key_values.memories


class Grafted(Whole):
    """What a model's class becomes: built with memories, saved and loaded with them."""

    shim = "from titans.hf.graft import GraftConfig  # noqa: F401  for trust_remote_code=True\n"

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        _plant(self, getattr(config, FIELD))  # type: ignore[arg-type]

    def __call__(self: Any, *args: Any, store_mask: Tensor | None = None, **kwargs: Any) -> Any:
        vars(getattr(self, FAMILIES[self.config.model_type][0]))[STORE] = store_mask  # which GPT-2's forward may lose
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class GraftedConfig:
    """What its configuration becomes: saved under a ``model_type`` of its own, lest a folder pass for the decoder's."""

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), "model_type": FIELD, "architectures": [Grafted.__name__]}  # type: ignore[misc]


class GraftConfig(PretrainedConfig):
    """Reads a grafted folder's config.json into the decoder's own configuration, which Auto classes then know."""

    model_type = FIELD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        family = _told(config_dict.get(FIELD), "config.json")["family"]
        return _kind(family).from_dict({**undigested(config_dict), "model_type": family}, **kwargs)


def graft(
    model: PreTrainedModel, layers: Sequence[int], chunk_size: int = 64, freeze: bool = True, **fields: Any
) -> PreTrainedModel:
    """Put a `titans.NeuralMemory` beside layers of a pretrained decoder; it computes what it did until gates open.

    Args:
        model: a causal language model of one of ``FAMILIES``; changed in place, and returned.
        layers: numbers of the layers, from 0.
        chunk_size: the memories' update unit.
        freeze: leave only the memories, their norms and gates to be trained.
        fields: of `TitansConfig` that make a memory: ``mem_heads``, ``mem_layers``, ``miras``, ``conv_kernel``, ...

    Raises:
        ValueError: an unknown family, no layer, one that is not there or named twice, memories that are there already.
    """
    check_kind("model", model, PreTrainedModel, "a causal language model of transformers")
    check_kind("layers", layers, Sequence, "a list of layers' numbers")
    for layer in layers:
        check_kind("layers", layer, int, "a list of layers' numbers")
    width = model.config.get_text_config().hidden_size
    memory = TitansConfig(variant="LMM", d_model=width, chunk_size=chunk_size, **fields)
    told = {"family": model.config.model_type, "layers": sorted(layers), "memory": memory.to_dict()}
    return _take(model, {**told, "semantics": SEMANTICS}, freeze)


def save_graft(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the memories alone; `load_graft` puts them beside the same pretrained model again."""
    if not hasattr(getattr(model, "config", None), FIELD):
        raise ValueError(f"model must have memories, see graft, got {type(model).__name__}")
    told = {"format": "pt", FIELD: json.dumps(getattr(model.config, FIELD)), "decoder": _mark(model)}
    tensors = {name: p.detach().cpu().contiguous() for name, p in grafts(model).state_dict().items()}
    told["hash"] = hash_tensors(tensors, told)
    write_whole(path_of("folder", folder) / WEIGHTS, lambda aside: save_file(tensors, aside, told))


def load_graft(model: PreTrainedModel, folder: str | Path, freeze: bool = True) -> PreTrainedModel:
    """Graft onto a pretrained model what `save_graft` wrote; ``freeze`` as in `graft`.

    Raises:
        FileNotFoundError: ``folder`` holds no such file.
        ValueError: the file is damaged, is not `save_graft`'s, or does not fit the model, which is then left as it was
            but in the last case.
    """
    path = path_of("folder", folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if FIELD not in metadata:
        raise ValueError(f"{path} was not written by save_graft")
    if metadata.pop("hash", None) != hash_tensors(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content is not what was saved (hash)")
    try:
        told = _told(json.loads(metadata[FIELD]), path)
    except RecursionError:
        raise ValueError(f"{path}: {FIELD} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {FIELD} is not JSON: {error}") from error
    if told["family"] != model.config.model_type or metadata.get("decoder") != _mark(model):
        raise ValueError(f"{path} was saved beside another pretrained model")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path} has entries that are not finite")
    _take(model, told, freeze)
    try:
        grafts(model).load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this model: {' '.join(str(error).split())}") from error
    return model


def _told(told: Any, where: str | Path) -> dict[str, Any]:
    """What ``where`` says about memories; a ValueError where that is something else."""
    kinds = {"family": str, "layers": list, "memory": dict, "semantics": str}
    if not isinstance(told, dict) or not all(isinstance(told.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{where}: {FIELD} must have {', '.join(kinds)} as graft writes them, got {str(told)[:80]}")
    return told


def _mark(model: PreTrainedModel) -> str:
    """Tells a pretrained model from others: by some rows of its embedding, in the precision that all copies have."""
    weight: Any = model.get_input_embeddings().weight
    return hash_tensors({"embedding": weight[:256].detach().to(torch.bfloat16)}, {})


@cache
def _with(mixin: type, kind: type) -> Any:
    """``kind`` with ``mixin`` before it, under its own name, by which transformers knows it."""
    return kind if issubclass(kind, mixin) else type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _kind(family: str) -> Any:
    """The class of a grafted model's configuration, by which ``AutoModelForCausalLM`` knows the model's."""
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)} (add it), got {family!r}")
    kind = _with(GraftedConfig, CONFIG_MAPPING[family])
    model = _with(Grafted, MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])
    AutoModelForCausalLM.register(kind, model, exist_ok=True)
    return kind


def _take(model: PreTrainedModel, told: dict[str, Any], freeze: bool) -> PreTrainedModel:
    """Graft a model that is there, and note in its configuration how."""
    if hasattr(model.config, FIELD):
        raise ValueError(f"the model has memories already, beside layers {getattr(model.config, FIELD)['layers']}")
    kind = _kind(model.config.model_type)
    _layers(model, told)  # refused before anything is changed
    if freeze:
        model.requires_grad_(False)
    _plant(model, told)
    model.__class__, model.config.__class__ = _with(Grafted, type(model)), kind
    setattr(model.config, FIELD, told)
    model.config.auto_map = {"AutoConfig": f"{SHIM.removesuffix('.py')}.GraftConfig"}
    return model


def _plant(model: PreTrainedModel, told: dict[str, Any]) -> None:
    check_semantics(_told(told, "the configuration")["semantics"], "graft")
    found, config = _layers(model, told), TitansConfig.from_dict(told["memory"])
    for i in told["layers"]:
        found[i].add_module(NAME, Graft(config, i).to(model.device, model.dtype))
        found[i].register_forward_hook(_add, with_kwargs=True)
    getattr(model, FAMILIES[model.config.model_type][0]).register_forward_pre_hook(_note, with_kwargs=True)


def _layers(model: PreTrainedModel, told: dict[str, Any]) -> nn.ModuleList:
    """The decoder's layers, among which those are that are told of, each once: one named twice would count double."""
    decoder, stack = FAMILIES[model.config.model_type]
    found, named = getattr(getattr(model, decoder), stack), told["layers"]
    if not named or len(set(named)) < len(named) or not set(named) <= set(range(len(found))):
        raise ValueError(f"layers must be among 0..{len(found) - 1}, each once, got {named}")
    return found


def _note(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Tell the memories where the call has padding, and by ``store_mask``, which only they know, what not to write."""
    read = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    store = kwargs.pop("store_mask", vars(decoder).pop(STORE, None))
    masks = {"mask": kwargs.get("attention_mask"), "store_mask": store}
    for name, mask in masks.items():
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(f"attention_{name} must be [B, T] for a model with memories (no static cache)")
        masks[name] = None if mask is None else mask[:, -read.shape[1] :].bool()
    for found in (module for module in decoder.modules() if isinstance(module, Graft)):
        found.masks = masks
    return args, kwargs


def _add(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's output with what its memory reads at the layer's input."""
    x = args[0] if args else kwargs["hidden_states"]
    held = next((memories(v) for v in (*args, *kwargs.values()) if isinstance(v, Cache)), {})
    read = getattr(layer, NAME)(x, held)
    return (output[0] + read, *output[1:]) if isinstance(output, tuple) else output + read
