"""A neural memory beside chosen layers of a pretrained decoder, behind a gate that starts at zero.

The decoder's weights keep their names; the memories' states ride on its cache, and what moves its rows moves theirs.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, Cache, PreTrainedModel

from titans.files import write_whole
from titans.hf.adapter import check_loaded
from titans.hf.config import leads_here
from titans.layers.neural_memory import NeuralMemoryState
from titans.models import TitansConfig
from titans.models.folder import SHIM
from titans.models.mixers.parts import make_memory
from titans.models.semantics import SEMANTICS, check_semantics

# Where a model of this type keeps its decoder, and the decoder its layers. Add a line for a family of your own.
FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model", "layers")),
    "gpt2": ("transformer", "h"),
}
NAME, FIELD, WEIGHTS = "titans_memory", "titans_graft", "titans_graft.safetensors"
SHIM_TEXT = "from titans.hf.graft import GraftedForCausalLM  # noqa: F401  for trust_remote_code=True\n"


class Graft(nn.Module):
    """tanh(gate) ⊗ M(norm(x)) for a layer's input x [B, T, d_model], to be added to its output."""

    def __init__(self, config: TitansConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm = nn.RMSNorm(config.d_model)
        self.memory = make_memory(config)
        self.gate = nn.Parameter(torch.zeros(config.d_model))
        self.mask: Tensor | None = None  # of the decoder's call, [B, T]: layers see none of this shape

    def forward(self, x: Tensor, held: dict[int, NeuralMemoryState]) -> Tensor:
        state = held.get(self.layer)
        read, held[self.layer] = self.memory(self.norm(x), state=state, return_state=True, mask=self.mask)
        return torch.tanh(self.gate) * read


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
    if not isinstance(past_key_values, Remembering):
        past_key_values.__class__ = _with(Remembering, type(past_key_values))
        past_key_values.memories = {}
    return past_key_values.memories


class Grafted:
    """What a model's class becomes: built with memories, it saves with the file that leads back here."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        _plant(self, getattr(config, FIELD))  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        write_whole(Path(save_directory) / SHIM, lambda aside: aside.write_text(SHIM_TEXT, encoding="utf-8"))


class GraftedForCausalLM:
    """Opens folders that a grafted model saved; ``AutoModelForCausalLM`` with ``trust_remote_code=True`` comes here."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> PreTrainedModel:
        """As AutoModelForCausalLM's; a ValueError where tensors are missing or left over."""
        config = AutoConfig.from_pretrained(path) if config is None else config
        kind = _with(Grafted, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        kwargs["output_loading_info"] = True
        return check_loaded(path, *kind.from_pretrained(path, *args, config=config, **kwargs))

    register_for_auto_class = classmethod(leads_here)


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
        ValueError: an unknown family, a layer that is not there, a model that has memories already.
    """
    width = model.config.get_text_config().hidden_size
    memory = TitansConfig(variant="LMM", d_model=width, chunk_size=chunk_size, **fields)
    return _take(model, {"layers": sorted(layers), "memory": memory.to_dict(), "semantics": SEMANTICS}, freeze)


def save_graft(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the memories alone; `load_graft` puts them beside the same pretrained model again."""
    told = {"format": "pt", FIELD: json.dumps(getattr(model.config, FIELD))}
    tensors = {name: p.detach().cpu().contiguous() for name, p in grafts(model).state_dict().items()}
    write_whole(Path(folder) / WEIGHTS, lambda aside: save_file(tensors, aside, told))


def load_graft(model: PreTrainedModel, folder: str | Path, freeze: bool = True) -> PreTrainedModel:
    """Graft onto a pretrained model what `save_graft` wrote; ``freeze`` as in `graft`."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        _take(model, json.loads(file.metadata()[FIELD]), freeze)
    grafts(model).load_state_dict(load_file(Path(folder) / WEIGHTS))
    return model


def grafts(model: nn.Module) -> nn.ModuleDict:
    """A model's memories, with norms and gates, by layer: all that there is to train beside a frozen model."""
    return nn.ModuleDict({str(module.layer): module for module in model.modules() if isinstance(module, Graft)})


@cache
def _with(mixin: type, kind: type) -> Any:
    """``kind`` with ``mixin`` before it, under its own name, by which transformers knows it."""
    return kind if issubclass(kind, mixin) else type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _take(model: Any, told: dict[str, Any], freeze: bool) -> PreTrainedModel:
    """Graft a model that is there, and note in its configuration how."""
    if hasattr(model.config, FIELD):
        raise ValueError(
            f"layers: the model has memories already, beside layers {getattr(model.config, FIELD)['layers']}"
        )
    if freeze:
        model.requires_grad_(False)
    _plant(model, told)
    model.__class__ = _with(Grafted, type(model))
    setattr(model.config, FIELD, told)
    model.config.auto_map = {"AutoModelForCausalLM": f"{SHIM.removesuffix('.py')}.GraftedForCausalLM"}
    return model


def _plant(model: PreTrainedModel, told: dict[str, Any]) -> None:
    check_semantics(told["semantics"], "graft")
    if model.config.model_type not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)} (add it), got {model.config.model_type!r}")
    decoder, stack = FAMILIES[model.config.model_type]
    found, config = getattr(getattr(model, decoder), stack), TitansConfig.from_dict(told["memory"])
    if not set(told["layers"]) <= set(range(len(found))):
        raise ValueError(f"layers must be among 0..{len(found) - 1}, got {told['layers']}")
    for i in told["layers"]:
        found[i].add_module(NAME, Graft(config, i).to(model.device, model.dtype))
        found[i].register_forward_hook(_add, with_kwargs=True)
    getattr(model, decoder).register_forward_pre_hook(_note, with_kwargs=True)


def _note(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tell the memories where the call has padding."""
    read = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask must be [B, T] for a model with memories (no static cache)")
    for found in (module for module in decoder.modules() if isinstance(module, Graft)):
        found.mask = None if mask is None else mask[:, -read.shape[1] :].bool()


def _add(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's output with what its memory reads at the layer's input."""
    x = args[0] if args else kwargs["hidden_states"]
    held = next((memories(v) for v in (*args, *kwargs.values()) if isinstance(v, Cache)), {})
    read = getattr(layer, NAME)(x, held)
    return (output[0] + read, *output[1:]) if isinstance(output, tuple) else output + read
