"""The configuration of a training run: one YAML file, checked field by field, with ``--set`` overrides."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from titans.models import TitansConfig
from titans.models.config import MODEL_TYPE, MOST, CheckedModel, fields_of_folder
from titans.models.yaml_text import parse_yaml
from titans.names import path_of, suggestion
from titans.ops.memory import Engine

Model = TypeVar("Model", bound=BaseModel)

# TitansConfig carries these too, where users of similar packages expect them. One value each: given in one place it
# holds in both, given differently in both it is an error.
SHARED_FIELDS = {
    ("data", "length"): "max_seq_len",
    ("training", "lr"): "lr",
}


LONGEST_FILE = 10_000_000  # bytes
DEEPEST = 20  # parts of a field's name


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that names the field and its value."""


def _expanded(path: str) -> str:
    """``~`` at the beginning is the home folder, as in a shell."""
    if "\0" in path:
        raise ValueError("a path holds no NUL")
    return os.path.expanduser(path)


Words = Annotated[str, Field(min_length=1)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]


class Section(CheckedModel):
    """Base of the sections: unknown keys are errors, assignment is validated."""

    model_config = ConfigDict(validate_default=True)


class DataSection(Section):
    """What to train on.

    Args:
        source: corpus name as `titans.data.load_documents` knows it, or a path. Default: Python's standard library.
        tokenizer: "bytes" or the path of a ``tokenizer.json``.
        text_field: the field that holds the text in jsonl and parquet files.
        data_dir: where downloaded corpora lie.
        length: tokens per training window, ≥ 2; the model's ``max_seq_len`` when left out.
        tasks: names of `titans.evaluation.TASKS` and the share of the rows that each has. The run then reads these
            instead of text, ``source`` is what they hide things in, and the loss is that of the answers alone.
        questions: most questions that a row of a task asks.
    """

    source: Place = "stdlib"
    tokenizer: Place = "bytes"
    text_field: Words = "text"
    data_dir: Place | None = None
    length: int = Field(ge=2, le=MOST)
    tasks: dict[str, Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]] | None = Field(None, min_length=1)
    questions: int = Field(4, ge=1, le=1000)


class TrainingSection(Section):
    """How to train.

    Args:
        output_dir: folder of the run: checkpoints, metrics.jsonl, pictures and the final ``model``.
        init_from: folder of a finished model to train on from, with a fresh optimizer and schedule; its configuration
            must be the run's, but for the length of windows (``data.length``) and the learning rate. None starts anew.
        steps: optimizer steps of the whole run.
        batch_size: windows per micro-batch, of all processes together; a multiple of their number.
        gradient_accumulation: micro-batches per optimizer step.
        lr, min_lr_ratio, warmup_steps, weight_decay: see `titans.training.optimizer`; lr is the model's when left out.
        clip: largest gradient norm, 0 switches clipping off.
        precision: "float32", or "bf16" for autocast (the memory's state stays float32).
        engine: of the memories, see `titans.ops.memory_scan`; "auto" takes the fastest that is exact.
        device: "auto" takes an accelerator if there is one.
        eval_every: steps between evaluations, 0 for none. The last step is always evaluated unless it is 0.
        eval_tokens: tokens of the validation split that an evaluation reads.
        save_every: steps between checkpoints, 0 for one at the end only.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: steps between printed lines where no progress bar can be drawn; metrics.jsonl has every step.
        probe_every: steps between probes of the memories (metrics.jsonl, memory.png), 0 for none. A probe reads one
            window without gradients.
        carry_state: each row reads consecutive windows of a document, from the state its last window left behind; the
            gradient stays inside a window (back-propagation further back: a larger ``data.length``). Evaluation reads
            its documents in the same way, without fresh starts; in other runs each window from an empty memory.
        carry_fresh: share of windows that start afresh though their document goes on.
        carry_turns: streams that each row of the batch reads in turn, a window of one after a window of the other: the
            more, the more varied are the windows of neighbouring steps.
        seed: of the initial weights and of the windows.
        threads: CPU threads of torch, None for torch's own choice.
    """

    output_dir: Place = "runs/titans"
    init_from: Place | None = None
    steps: int = Field(1000, ge=1, le=MOST)
    batch_size: int = Field(8, ge=1, le=2**20)
    gradient_accumulation: int = Field(1, ge=1, le=2**20)
    lr: float = Field(gt=0, le=1000, allow_inf_nan=False)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, allow_inf_nan=False)
    warmup_steps: int = Field(100, ge=0, le=MOST)
    weight_decay: float = Field(0.1, ge=0, le=1000, allow_inf_nan=False)
    clip: float = Field(1.0, ge=0, le=1e9, allow_inf_nan=False)
    precision: Literal["float32", "bf16"] = "float32"
    engine: Engine = "auto"
    device: Literal["auto", "cpu"] = "auto"
    eval_every: int = Field(200, ge=0, le=MOST)
    eval_tokens: int = Field(100_000, ge=1, le=2**53)
    save_every: int = Field(500, ge=0, le=MOST)
    keep_checkpoints: int = Field(2, ge=1, le=MOST)
    log_every: int = Field(10, ge=1, le=MOST)
    probe_every: int = Field(10, ge=0, le=MOST)
    carry_state: bool = False
    carry_fresh: float = Field(0.3, ge=0, le=1, allow_inf_nan=False)
    carry_turns: int = Field(4, ge=1, le=2**20)
    seed: int = Field(0, ge=0, lt=2**32)
    threads: int | None = Field(None, ge=1, le=512)

    @property
    def windows_per_step(self) -> int:
        """Of all micro-batches of an optimizer step."""
        return self.batch_size * self.gradient_accumulation


class TrainConfig(Section):
    """A training run: the sections ``model``, ``data`` and ``training`` of the YAML file."""

    model: TitansConfig
    data: DataSection
    training: TrainingSection

    @model_validator(mode="before")
    @classmethod
    def share(cls, raw: Any) -> Any:
        """Give the fields of SHARED_FIELDS the same value in the model's section and in their own."""
        if not isinstance(raw, dict):
            return raw
        sections = {name: _as_dict(raw.get(name)) for name in cls.model_fields}
        model = sections["model"]
        if not all(isinstance(section, dict) for section in sections.values()):
            return raw
        for (section, name), field in SHARED_FIELDS.items():
            own = sections[section].get(name)
            if own is None:
                own = model.get(field, TitansConfig.model_fields[field].default)
            theirs = model.get(field, own)
            if theirs is not own and theirs != own:
                raise ValueError(f"{section}.{name} is {own!r} but model.{field} is {theirs!r}: give one of them")
            sections[section][name] = model[field] = own
        return {**raw, **sections}

    @model_validator(mode="after")
    def _carries(self) -> "TrainConfig":
        if self.training.carry_state and self.model.variant == "transformer":
            raise ValueError("training.carry_state: full attention keeps every token it has read, got True")
        if self.training.carry_state and self.data.tasks is not None:
            raise ValueError("training.carry_state: every row of data.tasks is a text of its own, got True")
        return self

    @property
    def eval_windows(self) -> int:
        """Windows that an evaluation reads, at least 1."""
        return max(1, self.training.eval_tokens // self.data.length)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Read a YAML file and apply overrides of the form ``section.field=value``, the value parsed as YAML.

        Raises:
            ConfigError: when the file is missing or malformed, or a field is unknown or out of range.
        """
        return cls.parse(read_mapping(path), overrides, origin=str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> "TrainConfig":
        """Check a nested mapping as `load` checks a file; ``origin`` begins every message."""
        return _validated(cls, raw, overrides, origin)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default spelt out, the memory's rule included.

        Not the cap of θ, which follows chunk size and rule: whoever changes these in the file wants another one.
        """
        model = {**self.model.to_dict(), "theta_max": self.model.theta_max}
        return {**self.model_dump(mode="json"), "model": model}

    def to_yaml(self, path: str | Path) -> None:
        """Write ``to_dict`` as YAML."""
        path_of("path", path).write_text(self.to_text(), encoding="utf-8")

    def check(self) -> None:
        """Raise a ConfigError where fields that were assigned since do not fit each other: what one section says is
        not looked at when a field of another is assigned."""
        self.parse(self.to_dict())

    def to_text(self) -> str:
        """``to_dict`` as YAML, which can be read again: see `check`."""
        self.check()
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_model_config(path: str | Path, overrides: Sequence[str] = ()) -> TitansConfig:
    """The model's configuration from a run's file (its ``model`` section) or from a file of its own.

    Raises:
        ConfigError: as `TrainConfig.load`.
    """
    raw = read_mapping(path)
    if "model" in raw:
        return TrainConfig.parse(raw, overrides, origin=str(path)).model
    if raw.get("model_type") == MODEL_TYPE:  # a model's folder says more than our fields; --set may not
        try:
            raw = fields_of_folder(raw)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    return _validated(TitansConfig, raw, overrides, str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file that holds a mapping.

    Raises:
        ConfigError: when it is missing, not readable, not YAML or not a mapping.
    """
    try:
        with path_of("path", path).open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > LONGEST_FILE:
        raise ConfigError(f"{path}: longer than {LONGEST_FILE:,} bytes, that is no configuration")
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:', got {type(raw).__name__}")
    return raw


def describe(error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """A pydantic error as one line: ``field: what is wrong (got value)``, several joined by semicolons."""
    lines = []
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_suggestion(path, root)} (value {_short(item['input'])})"
        elif item["type"] == "missing":
            message = "required, but not given"
        else:
            message = item["msg"].removeprefix("Value error, ")
            if not isinstance(item["input"], (dict, BaseModel)):
                message += f" (got {_short(item['input'])})"
        lines.append(": ".join(filter(None, [_short(".".join(path), str), message])))
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return " ".join("; ".join(lines[:5]).split()) + more


def _short(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value as a message shows it, a long one cut."""
    if isinstance(value, list | tuple | dict | set) and len(value) > 3:  # its text alone could fill the memory
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = write(value)
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _validated(model: type[Model], raw: dict[str, Any], overrides: Sequence[str], origin: str) -> Model:
    """A mapping with its overrides as a checked ``model``."""
    raw = copy.deepcopy(raw)
    for override in overrides:
        set_field(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe(error, model)}") from error
    except (TypeError, ArithmeticError, RecursionError) as error:  # a validator met what it did not expect
        raise ConfigError(f"{origin}: {type(error).__name__}: {error}") from error


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: {_short(str(error), str)}") from error


def set_field(raw: dict[str, Any], override: str) -> None:
    """Apply one ``a.b=c`` to the nested mapping in place."""
    path, sign, text = override.partition("=")
    if not sign or not path or not all(path.split(".")):
        raise ConfigError(f"--set {_short(override, str)}: expected section.field=value")
    if path.count(".") >= DEEPEST:
        raise ConfigError(f"--set {_short(override, str)}: no field lies so deep")
    *parents, last = path.split(".")
    node: Any = raw
    for depth, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(
                f"--set {_short(override, str)}: {'.'.join(parents[: depth + 1])} is {_short(node)}, it has no fields"
            )
    value = _parse_yaml(text, f"--set {_short(override, str)}")
    if not parents and node.get(last) and last in TrainConfig.model_fields:
        raise ConfigError(f"--set {_short(override, str)}: would drop every setting of {last}; name a field of it")
    node[last] = value


def _as_dict(section: Any) -> Any:
    """A section as a fresh dict of what was given; anything that is no section is returned as it is."""
    if section is None:
        return {}
    if isinstance(section, BaseModel):
        return section.model_dump(mode="json", exclude_unset=True)
    return dict(section) if isinstance(section, dict) else section


def _suggestion(path: list[str], root: type[BaseModel] | None) -> str:
    """``, did you mean 'x'?`` when a field of the same section is spelt like the last part of ``path``."""
    fields = root.model_fields if root is not None else {}
    for part in path[:-1]:
        fields = getattr(fields[part].annotation, "model_fields", {}) if part in fields else {}
    return suggestion(path[-1], fields)
