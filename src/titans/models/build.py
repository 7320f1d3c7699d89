"""Models from configurations and folders, and back: build, save, load, count."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from titans.files import write_whole
from titans.models.config import TitansConfig
from titans.models.language_model import TitansModel
from titans.models.semantics import SEMANTICS, check_semantics
from titans.models.variants import CLASSES


def build_model(config: TitansConfig) -> TitansModel:
    """The model that ``config`` describes, as an instance of its variant's class."""
    kind = CLASSES.get(config.variant, TitansModel)
    model = kind.__new__(kind)
    TitansModel.__init__(model, config.model_copy(deep=True))
    return model


def save_model(model: TitansModel, path: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into a folder, each moved into place when complete."""
    folder = Path(path)
    model.config.to_dict()  # refuses what cannot be saved before anything is written
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    metadata = {"format": "pt", "semantics": SEMANTICS}
    write_whole(folder / "model.safetensors", lambda aside: save_file(tensors, aside, metadata))
    write_whole(folder / "config.json", model.config.to_json)


def load_model(path: str | Path) -> TitansModel:
    """Read a folder written by ``save_pretrained``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not fit the configuration, or were made for other semantics.
    """
    folder = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {name}")
    config = TitansConfig.from_json(folder / "config.json")
    model = build_model(config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata() or {}
        check_semantics(metadata.get("semantics", metadata.get("computation")), f"model folder {str(folder)!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if config.tie_embeddings and "embedding.weight" in tensors:
        tensors["head.weight"] = tensors["embedding.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"model folder {str(folder)!r} does not fit its config.json: {error}") from error
    return model


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
