"""What a run leaves in its folder: which checkpoints are whole, whether a run may start or go on there."""

import json
import re
from pathlib import Path

from titans.files import write_whole
from titans.training.config import ConfigError, TrainConfig, read_mapping

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"
MEMORY_FILE = "memory.png"
MODEL_DIR = "model"

# Settings of the training section that a resumed run may change: they do not move a single weight, except ``steps``,
# which sets a new end of the schedule.
FREE_ON_RESUME = {
    *("output_dir", "steps", "eval_every", "eval_tokens", "save_every", "keep_checkpoints", "log_every"),
    *("threads", "device", "engine", "probe_every"),
}


def checkpoint_step(folder: Path) -> int | None:
    """The step of a complete checkpoint folder; None when the folder is none or was cut off while being written.

    transformers writes ``trainer_state.json`` last, so a checkpoint that has it, readable, has everything.
    """
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if match is None:
        return None
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return int(match[1]) if state.get("global_step") == int(match[1]) else None


def last_checkpoint(output_dir: str | Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run and its step, None when there is none."""
    folders = Path(output_dir).glob("checkpoint-*")
    complete = [(step, folder) for folder in folders if (step := checkpoint_step(folder)) is not None]
    return (max(complete)[1], max(complete)[0]) if complete else None


def check_folder(config: TrainConfig, resume: bool) -> tuple[Path, int] | None:
    """Find the checkpoint to go on from (with ``resume``), or make sure that nothing would be overwritten (without).

    Raises:
        ConfigError: nothing to resume from, a run already there, or a resumed run with other settings.
    """
    output_dir = Path(config.training.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"training.output_dir: {output_dir} is a file")
    found = last_checkpoint(output_dir)
    if not resume:
        if found is not None or (output_dir / MODEL_DIR).exists():
            raise ConfigError(
                f"training.output_dir: {output_dir} already holds a run; go on with --resume or choose another --output"
            )
        return None
    if found is None:
        raise ConfigError(f"training.output_dir: {output_dir} holds no complete checkpoint to resume from")
    # A run that was killed after its last step still has its model to write.
    if found[1] > config.training.steps or (found[1] == config.training.steps and (output_dir / MODEL_DIR).exists()):
        raise ConfigError(f"training.steps: the run in {output_dir} already reached step {found[1]}")
    check_same(config, output_dir / CONFIG_FILE)
    return found


def check_same(config: TrainConfig, path: Path) -> None:
    """Refuse to resume with a setting that would change what is computed."""
    before = TrainConfig.parse(read_mapping(path), origin=str(path)).to_dict()
    now = config.to_dict()
    for section, fields in now.items():
        for field, value in fields.items():
            if section == "training" and field in FREE_ON_RESUME:
                continue
            if before[section][field] != value:
                raise ConfigError(
                    f"{section}.{field}: the run was started with {before[section][field]!r}, "
                    f"it cannot be resumed with {value!r}"
                )


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``, which a resumed run writes again (and a last line that was cut off)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_whole(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
