"""What a run leaves in its folder: which checkpoints are whole, whether a run may start or go on there.

A checkpoint is complete when it has a ``manifest.json``, which is written last: the size and SHA-256 of every file, the
step, the run, the number of processes and the fingerprint of the corpus. What differs from it by a single bit is no
checkpoint. Until then a file ``begun`` in it says which run is writing. No folder is removed that neither says to be
this run's, whatever its name.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from titans.data.corpora import RUN_MARK
from titans.files import hash_file, open_to_umask, write_whole
from titans.names import path_of
from titans.training.config import SHARED_FIELDS, ConfigError, TrainConfig, read_mapping

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"
MEMORY_FILE = "memory.png"
MODEL_DIR = "model"
MANIFEST = "manifest.json"
BEGUN = "begun"
OUR_FILES = (CONFIG_FILE, METRICS_FILE, CURVE_FILE, MEMORY_FILE)

# Settings of the training section that a resumed run may change: they do not move a single weight, except ``steps``,
# which sets a new end of the schedule.
FREE_ON_RESUME = {
    *("output_dir", "steps", "eval_every", "eval_tokens", "save_every", "keep_checkpoints", "log_every"),
    *("threads", "device", "engine", "probe_every"),
}


class CheckpointError(OSError):
    """A checkpoint could not be written; the message names it and says why. The one before is still there."""


class Damaged(ValueError):
    """A folder is no complete checkpoint; the message says what is wrong with which file."""


@dataclass(frozen=True)
class Stamp:
    """What a checkpoint says of its run besides the step.

    Attributes:
        run: a random name, given when the run starts.
        processes: that train together.
        corpus: fingerprints of the splits that are read, None for one that is not.
    """

    run: str
    processes: int
    corpus: dict[str, str | None]


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from.

    Attributes:
        folder, step: where it is, and how many steps it has behind it.
        stamp: of the run.
        notes: a line for every newer checkpoint that is not whole.
    """

    folder: Path
    step: int
    stamp: Stamp
    notes: tuple[str, ...] = ()


def _numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Everything called checkpoint-N, the newest first."""
    folders = path_of("output_dir", output_dir).glob("checkpoint-*")
    matches = ((re.fullmatch(r"checkpoint-(\d{1,18})", folder.name), folder) for folder in folders)
    return sorted(((int(match[1]), folder) for match, folder in matches if match), reverse=True)


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of ``checkpoint-{step}``, itself intact; whether the files fit it, `check_files` says.

    Raises:
        Damaged: there is none, or it is not what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        Stamp(**manifest["stamp"])
        whole = manifest.pop("hash") == _hash(manifest) and manifest["step"] == step
    except FileNotFoundError:
        raise Damaged(f"{folder / MANIFEST} is missing, the checkpoint is not complete") from None
    except OSError as error:
        raise Damaged(f"{folder / MANIFEST}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{folder / MANIFEST} is damaged") from None
    if not whole:
        raise Damaged(f"{folder / MANIFEST} is damaged or of another step")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with the manifest.

    Raises:
        Damaged: names the first one that differs.
    """
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(there - {MANIFEST, BEGUN} - set(manifest["files"])):
        raise Damaged(f"{folder / name} was not written with the checkpoint")
    for name, told in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != told["bytes"]:
                raise Damaged(f"{path} has {size} bytes, {told['bytes']} were written")
            if hash_file(path) != told["sha256"]:
                raise Damaged(f"{path} is damaged: its content is not what was written")
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise Damaged(f"{path}: {error.strerror}") from error


def last_checkpoint(output_dir: str | Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run and its step, None when there is none; its files are not read."""
    for step, folder in _numbered(output_dir):
        try:
            read_manifest(folder, step)
        except Damaged:
            continue
        return folder, step
    return None


def find_checkpoint(output_dir: Path) -> Found:
    """The newest checkpoint of the run in ``output_dir`` whose every file is what was written.

    Raises:
        ConfigError: there is none; the message says what is wrong with each.
    """
    mark = _run_mark(output_dir / CONFIG_FILE)
    notes: list[str] = []
    for step, folder in _numbered(output_dir):
        try:
            manifest = read_manifest(folder, step)
            if manifest["stamp"]["run"] != mark:
                raise Damaged(f"{folder} is of another run than {output_dir / CONFIG_FILE}")
            check_files(folder, manifest)
        except Damaged as damage:
            notes.append(str(damage))
            continue
        notes = [f"{note}; going on from {folder.name}" for note in notes]
        return Found(folder, step, Stamp(**manifest["stamp"]), tuple(notes))
    reasons = "".join(f"; {note}" for note in notes)
    raise ConfigError(f"training.output_dir: {output_dir} holds no complete checkpoint to resume from{reasons}")


def begin(folder: Path, run: str) -> None:
    """Before a checkpoint is written: make its folder and mark it as the run's. What this run left there goes, anything
    else is moved aside."""
    if os.path.lexists(folder):
        if _whose(folder) == run:
            shutil.rmtree(folder)
        else:
            folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}"))
    folder.mkdir(parents=True)
    (folder / BEGUN).write_text(run, encoding="utf-8")


def _whose(folder: Path) -> str | None:
    """The run that wrote a checkpoint or was writing it; None where nothing says so."""
    with suppress(Damaged, ValueError):
        return read_manifest(folder, int(folder.name.removeprefix("checkpoint-")))["stamp"]["run"]
    return _writer(folder)


def _writer(folder: Path) -> str | None:
    """The run that was writing a checkpoint when it was killed."""
    try:
        return (folder / BEGUN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def finish(folder: Path, step: int, stamp: Stamp, keep: int) -> None:
    """Make a written folder a checkpoint, by its manifest, and remove all but the ``keep`` newest ones of the run."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
    open_to_umask(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / BEGUN)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in paths
    }
    manifest: dict[str, Any] = {"step": step, "stamp": asdict(stamp), "files": files}
    manifest["hash"] = _hash(manifest)
    write_whole(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))
    (folder / BEGUN).unlink(missing_ok=True)
    older = [other for number, other in _numbered(folder.parent) if number <= step and _whose(other) == stamp.run]
    half = [other for other in older if _writer(other) is not None]
    for other in half + [other for other in older if other not in half][keep:]:
        shutil.rmtree(other, ignore_errors=True)


def _hash(manifest: dict[str, Any]) -> str:
    told = {name: value for name, value in manifest.items() if name != "hash"}
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def check_folder(config: TrainConfig, resume: bool) -> Found | None:
    """Find the checkpoint to go on from (with ``resume``), or make sure that nothing would be overwritten (without).

    Raises:
        ConfigError: nothing to resume from, something in the way, or a resumed run with other settings.
    """
    output_dir = Path(config.training.output_dir)
    _check_kinds(output_dir)
    begun = last_checkpoint(output_dir) is not None or os.path.lexists(output_dir / MODEL_DIR)
    if not resume:
        if begun:
            raise ConfigError(
                f"training.output_dir: {output_dir} already holds a run; go on with --resume or choose another --output"
            )
        _check_ours(output_dir)
        return None
    if not _numbered(output_dir):
        raise ConfigError(f"training.output_dir: {output_dir} holds no complete checkpoint to resume from")
    check_same(config, output_dir / CONFIG_FILE)
    if _was_edited(output_dir / CONFIG_FILE):
        raise ConfigError(
            f"training.output_dir: {output_dir / CONFIG_FILE} was edited after the run wrote it, and what the run was "
            "started with is not known any more; undo that, and give what shall change with --set or in another file"
        )
    found = find_checkpoint(output_dir)
    # A run that was killed after its last step still has its model to write.
    left = config.training.steps - found.step
    if left < 0 or (left == 0 and _is_newer(output_dir / MODEL_DIR / "model.safetensors", found.folder / MANIFEST)):
        raise ConfigError(f"training.steps: the run in {output_dir} already reached step {found.step}")
    return found


def _is_newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= other.stat().st_mtime_ns


def _check_kinds(output_dir: Path) -> None:
    """Files where we write files, folders where we write folders."""
    for path in (output_dir / name for name in OUR_FILES):
        if path.exists() and not path.is_file():
            raise ConfigError(f"training.output_dir: {path} is not a file; choose another --output")
    for path in (output_dir / MODEL_DIR, *(folder for _, folder in _numbered(output_dir))):
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"training.output_dir: {path} is not a folder; choose another --output")


def _check_ours(output_dir: Path) -> None:
    """A run that was cut short before its first checkpoint may start again; nobody else's file may be overwritten."""
    there = [output_dir / name for name in OUR_FILES if os.path.lexists(output_dir / name)]
    there += [folder for _, folder in _numbered(output_dir) if any(folder.iterdir())]
    if there and not _is_ours(output_dir / CONFIG_FILE):
        raise ConfigError(
            f"training.output_dir: {there[0]} is not of a run and would be overwritten; choose another --output"
        )


def write_config(config: TrainConfig, run: str) -> None:
    """Write OUTPUT/config.yaml: the run's name and a hash of what follows, then every setting."""
    text = config.to_text()
    told = f"{RUN_MARK}{run} {sha256(text.encode()).hexdigest()[:16]}\n{text}"
    path = Path(config.training.output_dir) / CONFIG_FILE
    write_whole(path, lambda aside: aside.write_text(told, encoding="utf-8"))


def _first_line(path: Path) -> tuple[list[str], str]:
    """The words of the mark, none where there is no mark, and the text that follows it."""
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return [], ""
    return (first.removeprefix(RUN_MARK).split() if first.startswith(RUN_MARK) else []), rest


def _run_mark(path: Path) -> str | None:
    words, _ = _first_line(path)
    return words[0] if words else None


def _is_ours(path: Path) -> bool:
    words, rest = _first_line(path)
    return len(words) == 2 and words[1] == sha256(rest.encode()).hexdigest()[:16]


def _was_edited(path: Path) -> bool:
    """Does the text differ from what was written, where its first line tells a hash?"""
    return len(_first_line(path)[0]) == 2 and not _is_ours(path)


def check_same(config: TrainConfig, path: Path) -> None:
    """Refuse to resume with a setting that would change what is computed."""
    before = TrainConfig.parse(read_mapping(path), origin=str(path)).to_dict()
    now, shared = config.to_dict(), SHARED_FIELDS.values()  # the latter are told under their own section
    for section, fields in now.items():
        for field, value in fields.items():
            if (section == "training" and field in FREE_ON_RESUME) or (section == "model" and field in shared):
                continue
            if before[section][field] != value:
                raise ConfigError(
                    f"{section}.{field}: the run was started with {before[section][field]!r}, "
                    f"it cannot be resumed with {value!r}"
                )


def check_stamp(found: Found, stamp: Stamp) -> None:
    """Refuse to resume on another corpus or with another number of processes."""
    if found.stamp.processes != stamp.processes:
        raise ConfigError(
            f"training.batch_size: the run was started with {found.stamp.processes} processes, each with its "
            f"own share of the batches; it cannot be resumed with {stamp.processes}"
        )
    for split, fingerprint in stamp.corpus.items():
        before = found.stamp.corpus.get(split)
        if None not in (before, fingerprint) and before != fingerprint:
            raise ConfigError(
                f"data.source: its {split} split has changed since {found.folder} was written, the run cannot go on"
            )


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics file that are records of a step, and how many lines are none."""
    records, bad = [], 0
    for line in _lines(path):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad += 1
    return records, bad


def _lines(path: Path) -> Iterable[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()


def truncate_metrics(path: Path, step: int) -> str | None:
    """Drop the lines after ``step``, which a resumed run writes again, and those that cannot be read.

    Returns:
        What is missing, None where every step has its line.
    """
    if not path.exists() and step < 0:
        return None
    records, bad = read_records(path)
    kept = [record for record in records if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    steps = {record["step"] for record in kept if "loss" in record}
    missing = max(step, 0) - len(steps)
    return f"{path}: {missing} steps up to {step} have no readable line ({bad} lines dropped)" if missing > 0 else None
