"""The one folder format: ``config.json``, ``model.safetensors``, and a file that leads transformers to `titans.hf`.

What `TitansModel.save_pretrained`, ``titans.hf``, and training write are the same files with the same tensor names, so
every reader opens every folder. Names begin with ``model.``, as transformers names what lies in a model with a head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans.files import write_whole
from titans.models.config import MODEL_TYPE, TitansConfig
from titans.models.semantics import SEMANTICS, check_semantics

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "model."
ARCHITECTURE = "TitansForCausalLM"
SHIM = "modeling_titans.py"
SHIM_TEXT = "from titans.hf import TitansForCausalLM, TitansHFConfig  # noqa: F401  for trust_remote_code=True\n"
AUTO_MAP = {"AutoConfig": "modeling_titans.TitansHFConfig", "AutoModelForCausalLM": f"modeling_titans.{ARCHITECTURE}"}


def header() -> dict[str, Any]:
    """What a folder's ``config.json`` says beside the fields of `TitansConfig`."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "semantics": SEMANTICS,
    }


def write_folder(folder: str | Path, config: TitansConfig, tensors: dict[str, Tensor]) -> None:
    """Write a model's files, each moved into place when complete; ``tensors`` by their names in a `TitansModel`."""
    folder = Path(folder)
    text = json.dumps({**header(), **config.to_dict()}, indent=2) + "\n"  # refuses what cannot be saved
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    metadata = {"format": "pt", "semantics": SEMANTICS}
    write_whole(folder / WEIGHTS, lambda aside: save_file(named, aside, metadata))
    write_whole(folder / SHIM, lambda aside: aside.write_text(SHIM_TEXT, encoding="utf-8"))
    write_whole(folder / CONFIG, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_folder(folder: str | Path) -> tuple[TitansConfig, dict[str, Tensor]]:
    """Configuration and tensors of a model's folder, by their names in a `TitansModel`; older folders included.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it was made for other semantics, or its configuration is none of ours.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"model folder {str(folder)!r} has no {CONFIG}")
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = _shards(folder / INDEX)
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = TitansConfig.from_dict(told)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {name}")
        with safe_open(folder / name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors |= {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        made_for = told if "model_type" in told else metadata  # transformers writes no metadata of ours
        check_semantics(made_for.get("semantics", made_for.get("computation")), f"model folder {str(folder)!r}")
    return config, tensors


def _shards(index: Path) -> list[str]:
    """The files that weights in several files lie in, all of them beside the index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of weights") from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index} names no weights beside it")
    return names
