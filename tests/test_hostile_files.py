"""Hostile cases of what is written and read: nobody else's file is replaced, no file is believed."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_hostile import forge
from tiny import ids, small
from titans import NeuralMemory
from titans.cli import main
from titans.files import write_whole
from titans.models import MemoryFile, ModelState, load_model
from titans.models.cost import measure_cost

MODEL = small("MAC")


@pytest.fixture
def state():
    return MODEL(ids()).state.detach()


@pytest.fixture
def folder(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def test_a_pipe_is_replaced_by_no_writer(tmp_path, state):
    """A device neither: as root /dev/null would become a file for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (state.save, lambda path: write_whole(path, lambda aside: aside.write_text("x"))):
        with pytest.raises(OSError, match="pipe'?: is a|is a device or a pipe.*pipe"):
            write(pipe)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


@pytest.mark.parametrize(
    "content",
    [b"precious", bytes(8) + b"an image of a disk", b'notes on "titans-state" ' * 9, b"\x05\0\0\0\0\0\0\0[1,2]",
     b'\x27\0\0\0\0\0\0\0{"__metadata__":{"form":"titans-state"}}'],
)  # fmt: skip
def test_a_state_replaces_no_file_but_a_states(tmp_path, state, content):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is there and no state file"):
        state.save(file)
    assert file.read_bytes() == content
    file.write_bytes(b"")  # what tempfile makes
    state.save(file)
    state.save(file)
    assert ModelState.load(file).seen == state.seen


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", '{"my app": 1}'), ("config.json", "[1]"), ("config.json", "my = settings"),
     ("model.safetensors", "mine"), ("model-00001-of-00002.safetensors", "mine")],
)  # fmt: skip
def test_a_model_replaces_no_file_of_another_program(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is there and of no model of titans"):
        MODEL.save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_model_of_ours_is_made_good_again(folder):
    (folder / "config.json").write_text("{")
    MODEL.save_pretrained(folder)
    (folder / "config.json").unlink()
    MODEL.save_pretrained(folder)
    assert load_model(folder)(ids()).logits.isfinite().all()


def test_settings_under_another_name_are_settings_that_were_edited(folder):
    """Folders of long ago had them under "titans"; there they would count before all others."""
    settings = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", lambda told: told.update(titans={**settings, "theta_max": 99.0}))
    with pytest.raises(ValueError, match="was edited"):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("n_layers", 65536, "n_layers is 65536, the weights are of 2 blocks"),
     ("vocab_size", 2**31 - 1, "embedding.weight"), ("n_persistent", 2**20, "persistent")],
)  # fmt: skip
def test_a_model_is_not_made_of_a_size_that_its_weights_do_not_have(folder, field, value, message):
    def claim(told):
        told.pop("digest")
        told[field] = value

    edit(folder / "config.json", claim)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_numbers_of_eight_bits_are_named(folder, tmp_path, state):
    with pytest.raises(ValueError, match="16 to 64 bits, got torch.float8_e4m3fn"):
        state.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="got torch.float8_e4m3fn"):
        state.to(torch.zeros(1, dtype=torch.float8_e4m3fn))
    state.save(tmp_path / "s.st")
    name = "layers[0].memory.memory.weights[0]"
    forge(tmp_path / "s.st", lambda tensors, told: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"weights\[0\] must be floating point, got torch.float8"):
        ModelState.load(tmp_path / "s.st")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="norm.weight must be floating point, got torch.float8"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounding_loses_no_memory_in_silence(tmp_path, state, dtype):
    with pytest.raises(ValueError, match=f"beyond the range of {dtype}"):
        state.map(lambda x: x * 1e300).save(tmp_path / "s.st", dtype)
    assert not (tmp_path / "s.st").exists()
    state.map(lambda x: x * 1e30).save(tmp_path / "s.st", dtype)


@pytest.mark.parametrize("change", [{"stored": "[]"}, {"about": '{"unfinished": 3}'}])
def test_what_a_file_says_beside_its_tensors_is_checked(tmp_path, state, change):
    state.save(tmp_path / "s.st", about={})
    forge(tmp_path / "s.st", lambda tensors, told: told.update(change))
    with pytest.raises(ValueError, match=r"s\.st.*is damaged"):
        MemoryFile.open(tmp_path / "s.st")


@pytest.mark.parametrize(
    "call",
    [
        lambda: MODEL(ids(), labels=ids(), num_items_in_batch=float("inf")),
        lambda: MODEL(ids(), labels=ids(), num_items_in_batch=torch.ones(2)),
        lambda: MODEL(ids()).state.select([0, True]),
        lambda: MODEL(ids()).state.select(torch.ones(2, dtype=torch.uint8)),
        lambda: NeuralMemory(8, theta_max="1"),
        lambda: NeuralMemory(8)(torch.ones(1, 3, 8), mask=True),
        lambda: NeuralMemory(8)(torch.ones(1, 3, 8), store_mask="x"),
        lambda: measure_cost(MODEL.config.model_copy(update={"n_persistent": 2**20})),
    ],
)
def test_a_value_of_another_kind_is_named(call):
    with pytest.raises(ValueError, match="num_items_in_batch|rows|theta_max|mask|n_persistent"):
        call()


@pytest.mark.parametrize("words", [["--model", ""], ["--model="], ["--memory", ""]])
def test_an_empty_name_is_not_the_working_directory(folder, monkeypatch, capsys, words):
    monkeypatch.chdir(folder)
    given = ["generate", "--prompt", "x", "--model", ".", *words]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert f"{words[0].rstrip('=')}: is empty" in told and told.count("\n") == 1


def test_a_tensor_under_two_names_is_no_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="a tensor is there twice"):
        load_model(folder)


def test_a_model_without_numbers_is_not_saved(folder):
    with pytest.raises(ValueError, match="got one on meta"):
        small("LMM").to("meta").save_pretrained(folder)
    assert load_model(folder).config.variant == "MAC"
