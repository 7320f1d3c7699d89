"""The one folder format: ``config.json``, ``model.safetensors``, and a file that leads transformers to `titans.hf`.

What `TitansModel.save_pretrained`, ``titans.hf``, and training write are the same files with the same tensor names, so
every reader opens every folder. Names begin with ``model.``, as transformers names what lies in a model with a head.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans.files import hash_file, naming, open_to_umask, write_whole
from titans.models import byte_tokenizer
from titans.models.config import FREE, MODEL_TYPE, TitansConfig, each_key_once
from titans.models.semantics import SEMANTICS, check_semantics
from titans.names import path_of

DIGEST = "digest"  # in config.json: what its settings and the files of weights were when they were written
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # whole or in shards
PREFIX = "model."
ARCHITECTURE = "TitansForCausalLM"
SHIM = "modeling_titans.py"
SHIM_TEXT = (
    "from titans.hf import TitansForCausalLM, TitansHFConfig, TitansHFModel  # noqa: F401  for trust_remote_code=True\n"
)
AUTO_MAP = {
    "AutoConfig": "modeling_titans.TitansHFConfig",
    "AutoModel": "modeling_titans.TitansHFModel",
    "AutoModelForCausalLM": f"modeling_titans.{ARCHITECTURE}",
}
FREE_WORDS = {
    DIGEST,
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "auto_map",
    "_name_or_path",
    "use_cache",
}
# Who reads the folders of another ``model_type``: imported when there is one to read, since it may need what we do not.
READERS = {"titans_graft": "titans.evaluation.grafted:read_graft"}


def header() -> dict[str, Any]:
    """What a folder's ``config.json`` says beside the fields of `TitansConfig`."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "semantics": SEMANTICS,
    }


def write_folder(folder: str | Path, config: TitansConfig, tensors: dict[str, Tensor]) -> None:
    """Write a model's folder, see `save_folder`; ``tensors`` by their names in a `TitansModel`."""
    text = json.dumps({**header(), **config.to_dict()}, indent=2) + "\n"  # refuses what cannot be saved
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}

    def write(aside: Path) -> None:
        aside.mkdir()
        save_file(named, aside / WEIGHTS, {"format": "pt", "semantics": SEMANTICS})
        (aside / SHIM).write_text(SHIM_TEXT, encoding="utf-8")
        (aside / CONFIG).write_text(text, encoding="utf-8")

    save_folder(folder, write)


def save_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a model's folder aside, then move it into place: nobody ever reads half a model.

    A folder that is there keeps its other files. It has no ``config.json`` while its files are replaced, so whoever
    comes in between, or after a crash just then, is refused; of old weights none stay beside new ones.

    Args:
        folder: what shall be there afterwards.
        write: called with a path to make a folder at.

    Raises:
        OSError: the place cannot be written; what was there before is still there.
        ValueError: a model of another kind lies there, which is nothing of ours to replace.
    """
    folder = Path(os.path.realpath(path_of("folder", folder)))
    if folder.is_dir():
        _check_ours(folder)

    def write_signed(new: Path) -> None:
        write(new)
        _add_tokenizer(new, folder)
        _sign(new)

    if not folder.is_dir():
        return write_whole(folder, write_signed)
    with naming(folder), tempfile.TemporaryDirectory(prefix=".", dir=folder) as aside:
        new = Path(aside) / folder.name
        write_signed(new)
        open_to_umask(new)
        names = sorted(os.listdir(new), key=lambda name: (name == CONFIG, name != SHIM, name))  # the configuration last
        if CONFIG in names:
            (folder / CONFIG).unlink(missing_ok=True)
        if any(map(WEIGHT_FILES.fullmatch, names)):
            for name in filter(WEIGHT_FILES.fullmatch, os.listdir(folder)):
                (folder / name).unlink()
        for name in names:
            os.replace(new / name, folder / name)


def _check_ours(folder: Path) -> None:
    """Raise a ValueError where a configuration or weights of somebody else would be replaced. Ours lie beside our
    `SHIM`, or say so themselves, as those of older folders do."""
    choose = "and is not ours to replace; choose another folder"
    found = [folder / name for name in os.listdir(folder) if name == CONFIG or WEIGHT_FILES.fullmatch(name)]
    if not found:
        return
    try:
        told = _told(folder)
    except (FileNotFoundError, ValueError):  # none, or a damaged one: whoever writes a whole model makes it good
        told = {}
    kind = told.get("model_type", MODEL_TYPE if "variant" in told or (folder / SHIM).is_file() else None)
    if kind is None:
        raise ValueError(f"{found[0]} is there and of no model of titans, {choose}")
    if kind != MODEL_TYPE and kind not in READERS:
        raise ValueError(f"{folder} holds a model of type {kind!r}, {choose}")


def _add_tokenizer(new: Path, folder: Path) -> None:
    """Of a model of 256 ids that comes without a tokenizer the tokens are bytes, as for all who read our folders."""
    names = (byte_tokenizer.TOKENIZER, byte_tokenizer.SETTINGS, byte_tokenizer.OLDER)
    if not (new / CONFIG).is_file() or any((place / name).exists() for place in (new, folder) for name in names):
        return
    told = _told(new)
    if told.get("model_type") == MODEL_TYPE and told.get("vocab_size") == byte_tokenizer.VOCABULARY:
        for name, text in byte_tokenizer.files().items():
            (new / name).write_text(text, encoding="utf-8")


def _sign(folder: Path) -> None:
    """Tie the configuration and the weights of a new folder to each other."""
    files = sorted(filter(WEIGHT_FILES.fullmatch, os.listdir(folder)))
    if not files or not (folder / CONFIG).is_file():
        return
    told = _told(folder)
    told[DIGEST] = {CONFIG: _settings(told), **{name: hash_file(folder / name) for name in files}}
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _settings(told: dict[str, Any]) -> str:
    """SHA-256 of what a ``config.json`` says about what is computed; transformers' own words in it may change, but for
    those that are a grafted decoder's settings."""
    names = ("semantics", "titans", "titans_graft", *sorted(set(TitansConfig.model_fields) - set(FREE)))
    if told.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        names = tuple(sorted(set(told) - FREE_WORDS))
    said = {name: told[name] for name in names if name in told}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def undigested(told: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says but for the digest, which is true of its own folder alone."""
    return {name: value for name, value in told.items() if name != DIGEST}


def check_settings(folder: str | Path) -> dict[str, str]:
    """Compare a folder's settings with what was written; older ones do not say.

    Returns:
        The hashes of all its files, as they were written; none of an older folder.

    Raises:
        ValueError: its settings are others.
    """
    told = _told(folder)
    written = told.get(DIGEST)
    if written is None:
        return {}
    if not isinstance(written, dict) or written.get(CONFIG) != _settings(told):
        raise ValueError(
            f"{Path(folder) / CONFIG} was edited or is of another model: the weights beside it were saved with other "
            f"settings; to compute something else with them on purpose, take {DIGEST!r} out of it"
        )
    return written


def check_digest(folder: str | Path) -> None:
    """Compare a folder with what was written; older ones do not say.

    Raises:
        ValueError: its settings or its weights are others; the message names the file.
    """
    written = check_settings(folder)
    if not written:
        return
    for name in sorted(set(filter(WEIGHT_FILES.fullmatch, os.listdir(folder))) | (set(written) - {CONFIG})):
        path = Path(folder) / name
        if not path.is_file() or hash_file(path) != written.get(name):
            raise ValueError(
                f"{path} is damaged or of another model: it is not what was saved with {CONFIG}; "
                f"if you changed it on purpose, take {DIGEST!r} out of {CONFIG}"
            )


def foreign_reader(folder: str | Path) -> Callable[[Path], Any] | None:
    """Who reads this folder, if it is not of our own ``model_type``.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or nobody knows its ``model_type``.
    """
    kind = str(_told(folder).get("model_type", MODEL_TYPE))  # older folders of ours say none
    if kind == MODEL_TYPE:
        return None
    if kind not in READERS:
        raise ValueError(
            f"model folder {str(folder)!r}: model_type must be {' or '.join(map(repr, [MODEL_TYPE, *READERS]))}, "
            f"got {kind!r}"
        )
    module, _, name = READERS[kind].partition(":")
    return getattr(import_module(module), name)


def _told(folder: str | Path) -> dict[str, Any]:
    """The folder's ``config.json``."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        wrong = f"has no {CONFIG}" if Path(folder).is_dir() or not os.path.lexists(folder) else "is not a folder"
        raise FileNotFoundError(f"model folder {str(folder)!r} {wrong}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(told).__name__}")
    return told


def read_folder(folder: str | Path) -> tuple[TitansConfig, dict[str, Tensor]]:
    """Configuration and tensors of a model's folder, by their names in a `TitansModel`; older folders included.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it was made for other semantics, its configuration is none of ours, or a file is damaged.
    """
    folder = Path(folder)
    told = _told(folder)
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = _shards(folder / INDEX)
    config = TitansConfig.from_dict(told)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {name}")
        try:
            with safe_open(folder / name, framework="pt") as file:
                metadata = file.metadata() or {}
                found = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                if len(found) < len(file.keys()) or found.keys() & tensors.keys():
                    raise ValueError(
                        f"{folder / name}: a tensor is there twice, with and without {PREFIX!r} or elsewhere"
                    )
                tensors |= found
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or no safetensors file: {error}") from error
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
