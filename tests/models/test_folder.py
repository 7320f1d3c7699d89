"""A model's folder is old, new or refused, wherever saving it stops."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from helpers import assert_close, relative_error
from tiny import ids, small
from titans.files import write_whole
from titans.models import load_model
from titans.models.folder import save_folder


class Stopped(Exception):
    """In the place of a kill."""


def stop_at(monkeypatch, count):
    """From the ``count``-th change of the folder on nothing happens any more."""
    left = [count]

    def counted(change):
        def stopping(*places, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return change(*places, **options)

        return stopping

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "unlink", counted(os.unlink))


def outcome(folder, expected):
    """Whose logits the folder's model has, "none" where it is refused."""
    if not (folder / "config.json").exists():
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load_model(folder)
        return "none"
    found = load_model(folder)(ids()).logits.double()
    return next(name for name, logits in expected.items() if relative_error(found, logits) < 1e-5)


def test_a_reader_finds_the_old_model_or_the_new_or_none(tmp_path, monkeypatch):
    """The two differ in what no shape tells: one's weights under the other's configuration would compute."""
    old, new = small("LMM", chunk_size=4), small("LMM", chunk_size=2)
    with torch.no_grad():
        new.norm.weight.mul_(2)
    expected = {"old": old(ids()).logits, "new": new(ids()).logits}
    found = []
    while "new" not in found:
        folder = tmp_path / str(len(found))
        old.save_pretrained(folder)
        with monkeypatch.context() as patched, suppress(Stopped):
            stop_at(patched, len(found))
            new.save_pretrained(folder)
        found.append(outcome(folder, expected))
    assert len(found) > 3 and list(dict.fromkeys(found)) == ["old", "none", "new"]


def test_nothing_changes_where_the_new_files_cannot_be_made(tmp_path):
    model = small("LMM")
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(aside):
        aside.mkdir()
        (aside / "config.json").write_text("half")
        raise OSError("no space left")

    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            save_folder(folder, fail)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    small("LMM").save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        model.save_pretrained(tmp_path / "file")


def test_weights_of_before_do_not_stay_beside_new_ones(tmp_path):
    """Shards beside a whole file, or the other way round, would be read instead of it."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    import titans.hf  # noqa: F401

    whole, shards = (small("MAC", n_layers=2).float() for _ in range(2))
    with torch.no_grad():
        shards.norm.weight.mul_(2)
    shards.save_pretrained(tmp_path / "other")
    adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    for model, save in ((shards, adapter), (whole, whole), (shards, adapter)):
        sizes = {"max_shard_size": "4KB"} if save is adapter else {}
        save.save_pretrained(tmp_path / "model", **sizes)
        assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (save is adapter)
        assert (tmp_path / "model" / "model.safetensors").exists() == (save is whole)
        assert_close(load_model(tmp_path / "model").eval()(ids()).logits, model.eval()(ids()).logits)


def test_the_folder_one_stands_in_can_be_saved_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        small("LMM").save_pretrained(".")
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads(Path("config.json").read_text())


def test_an_unknown_kind_of_folder_is_refused(tmp_path):
    for kind in ("llama", ["x"]):
        write_whole(tmp_path / "config.json", lambda path, kind=kind: path.write_text(json.dumps({"model_type": kind})))
        with pytest.raises(ValueError, match="model_type must be 'titans' or 'titans_graft', got"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        load_model(tmp_path)


def test_a_model_of_another_kind_is_not_replaced(tmp_path):
    model = small("MAC")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a model of type 'llama', and is not ours to replace"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_settings_that_were_edited_are_refused_before_a_model_is_built(tmp_path, monkeypatch):
    """A model of 65,000 layers takes minutes to build."""
    small("MAC").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "n_layers": 65_000}))
    monkeypatch.setattr("titans.models.build.build_model", lambda config: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"config\.json was edited"):
        load_model(tmp_path)
