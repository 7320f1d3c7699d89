"""Models from configurations and folders, and back: build, save, load, count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from titans.models.config import TitansConfig
from titans.models.folder import check_digest, check_settings, foreign_reader, read_folder, write_folder
from titans.models.language_model import TitansModel
from titans.models.variants import CLASSES
from titans.names import check_kind, path_of
from titans.ops.memory import Engine
from titans.state import FLOATS


def build_model(config: TitansConfig, engine: Engine | None = None) -> TitansModel:
    """The model that ``config`` describes, as an instance of its variant's class; ``engine``: see `TitansModel`."""
    if not isinstance(config, TitansConfig):
        raise ValueError(
            f"config must be a TitansConfig, got {type(config).__name__} (TitansConfig.from_dict reads one)"
        )
    kind = CLASSES.get(config.variant, TitansModel)
    model = kind.__new__(kind)
    TitansModel.__init__(model, config, engine)
    return model


def save_model(model: TitansModel, path: str | Path) -> None:
    """Write a folder that every reader opens, see `titans.models.folder`."""
    path = path_of("path", path)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must hold numbers to be saved, got one on meta")
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    write_folder(path, model.config, tensors)


def load_model(path: str | Path) -> TitansModel:
    """Read a model's folder, whoever wrote it: ``save_pretrained``, training (checkpoints too), or transformers.

    Weights of less than 32 bits become float32, which holds them all; those of float64 stay what they are.
    The folder of a grafted decoder (`titans.hf.graft`) gives a `titans.evaluation.grafted.GraftedModel`, called alike.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not fit the configuration, were made for other semantics, or are not finite, or
            weights or settings are not what was saved.
    """
    path = path_of("path", path)
    read = foreign_reader(path)
    if read is not None:
        return read(path)
    config, tensors = read_folder(path)
    check_settings(path)
    _check_tensors(tensors, path)
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if len(blocks) != config.n_layers:  # before a model is made that may be of any size
        raise ValueError(
            f"model folder {str(path)!r} does not fit its config.json: n_layers is {config.n_layers}, the weights are "
            f"of {len(blocks)} blocks"
        )
    if config.tie_embeddings and "embedding.weight" in tensors:
        shared = tensors["embedding.weight"]
        if not torch.equal(tensors.setdefault("head.weight", shared), shared):
            raise ValueError(f"model folder {str(path)!r}: head.weight differs from the embedding it is tied to")
    try:
        with torch.device("meta"):  # nothing is made of a size that the weights do not have
            build_model(config).load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()})
        model = build_model(config)
        if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
            model.double()
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise ValueError(f"model folder {str(path)!r} does not fit its config.json: {what}") from error
    check_digest(path)  # last: what is wrong with which tensor says more
    return model


def _check_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"model folder {str(path)!r}: {name} must be floating point, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"model folder {str(path)!r}: {name} has entries that are not finite")


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, shared ones counted once."""
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
