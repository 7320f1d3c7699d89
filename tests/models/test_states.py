"""State files are what was saved or are refused; states of other models, rules and weights are never taken."""

import json
import os
import random
import re
import struct
import threading
from dataclasses import replace

import pytest
import torch

from tiny import ALL, ids, small
from titans import MirasConfig, NeuralMemory
from titans.files import write_whole
from titans.models import ModelState
from titans.ops import memory_scan
from titans.state import walk


@pytest.fixture
def saved(tmp_path):
    model = small("MAC")
    state = model(ids()).state.detach()
    state.save(tmp_path / "s.st")
    return model, state, tmp_path / "s.st"


def test_any_bit_that_flipped_is_noticed(saved):
    _, _, path = saved
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        at = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="s.st"):
            ModelState.load(path)


@pytest.mark.parametrize("variant", ALL)
def test_a_state_of_one_row_and_one_head_is_saved_wherever_it_stands(tmp_path, variant):
    model = small(variant, n_heads=1, mem_heads=1, d_model=8)
    for tokens in range(1, 10):
        state = model(ids(1, tokens)).state.detach()
        state.save(tmp_path / "s.st")
        loaded = ModelState.load(tmp_path / "s.st")
        assert torch.equal(model(ids(1), state=loaded).logits, model(ids(1), state=state).logits)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_a_cut_file_is_refused(saved, share):
    _, _, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="s.st"):
        ModelState.load(path)


@pytest.mark.parametrize("field", ["format", "version", "semantics", "config", "weights", "seen", "layers", "hash"])
@pytest.mark.parametrize("value", [None, "", "null", "[]", "5", '["x"]', "[-5, 1]", "[" * 5000])
def test_edited_metadata_is_refused(saved, field, value):
    _, _, path = saved
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][field] = value
    if value is None:
        del header["__metadata__"][field]
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + content[8 + length :])
    with pytest.raises(ValueError, match="s.st"):
        ModelState.load(path)


def test_a_loaded_state_has_nothing_to_do_with_its_file(saved):
    model, state, path = saved
    loaded = ModelState.load(path)
    expected = model(ids(), state=state).logits
    path.write_bytes(b"")
    assert torch.equal(model(ids(), state=loaded).logits, expected)


def test_rows_of_another_model_are_not_put_in(saved):
    model, state, _ = saved
    other = small("MAC")
    with torch.no_grad():
        other.norm.weight += 1
    with pytest.raises(ValueError, match="other weights"):
        state.put([0], other(ids(1)).state)
    with pytest.raises(ValueError, match="needs a ModelState"):
        state.put([0], state.layers[0].select([0]))
    with pytest.raises(ValueError, match="another configuration"):
        state.put([0], small("MAC", chunk_size=8)(ids(1)).state)
    assert state.put([0], model(ids(1)).state).seen == (21, 21)


def test_a_state_put_together_across_a_step_cannot_be_saved(saved, tmp_path):
    model, state, _ = saved
    with torch.no_grad():
        model.norm.weight += 1
    mixed = state.put([0], model(ids(1)).state)
    mixed.save(tmp_path / "mixed")
    with pytest.raises(ValueError, match="other weights"):
        model(ids(), state=ModelState.load(tmp_path / "mixed"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(saved, tmp_path, umask):
    _, state, _ = saved
    before = os.umask(umask)
    try:
        state.save(tmp_path / "new" / "s.st")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "s.st").stat().st_mode & 0o777 == 0o666 & ~umask


def test_writing_touches_nothing_else(saved, tmp_path):
    _, state, path = saved
    (tmp_path / "s.st.part").write_text("mine")
    (tmp_path / "link").symlink_to(path)
    state.reset([0]).save(path)
    failures = []

    def save():
        try:
            state.save(tmp_path / "link")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "link").is_symlink() and ModelState.load(path).seen == state.seen
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "s.st", "s.st.part"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="not ours to replace"):
        state.save(tmp_path / "folder")


def test_a_folder_is_swapped_whole_and_foreign_files_stay(tmp_path, monkeypatch):
    def write(name):
        def inner(folder):
            folder.mkdir()
            (folder / name).write_text(name)

        return inner

    write_whole(tmp_path / "model", write("weights"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    replace = os.replace

    def fail(source, target):
        if target == tmp_path / "model" and source.name != "old":
            raise OSError("cut off")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cut off"):
        write_whole(tmp_path / "model", write("others"))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["notes.txt", "weights"]
    monkeypatch.undo()
    write_whole(tmp_path / "model", write("weights"))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["notes.txt", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "change",
    [
        {"miras": MirasConfig.titans()},
        {"miras": MirasConfig(retention="kl")},
        {"miras": MirasConfig(bias="huber")},
        {"conv_kernel": 0},
        {"conv_kernel": 2},
        {"conv_kernel": 8},
        {"chunk_size": 8},
    ],
)
def test_the_state_of_another_layer_is_refused(change):
    x = torch.randn(2, 9, 16)
    _, state = NeuralMemory(16, chunk_size=4)(x, return_state=True)
    other = NeuralMemory(16, **{"chunk_size": 4, **change})
    for read in (other, other.retrieve):
        with pytest.raises(ValueError, match=r"state\b"):
            read(x, state=state)


GATES = {"theta": 0.1, "eta": 0.5, "alpha": 0.1}


def scan(state=None, miras=None, **changes):
    torch.manual_seed(0)
    shape = (1, 6, 1, 4)
    tensors = {name: torch.randn(shape) for name in "qkv"}
    tensors |= {name: torch.full(shape[:3], value) for name, value in GATES.items()}
    tensors |= {"weights": (torch.randn(1, 16, 4), torch.randn(1, 4, 16))}
    for name, value in changes.items():
        tensors[name] = value(tensors[name]) if callable(value) else value
    return memory_scan(**tensors, miras=miras, chunk_size=4, state=state)


def spoil(value):
    def change(x):
        x = x.clone()
        x[0, 2] = value
        return x

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *((name, spoil(value), "must be finite") for name in "qkv" for value in (float("nan"), float("inf"))),
        *((name, spoil(float("nan")), "must be finite") for name in GATES),
        *((name, lambda x: x.long(), "must be floating point") for name in "qkv"),
        ("theta", spoil(-0.1), "must be at least 0, got -0.1"),
        ("eta", spoil(1.5), r"must lie in \[0, 1\], got 1.5"),
        ("alpha", spoil(-1), r"must lie in \[0, 1\], got -1"),
        ("weights", lambda w: (w[0], spoil(float("nan"))(w[1])), "must be finite"),
    ],
)
def test_gates_and_inputs_out_of_range_are_named(name, change, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        scan(**{name: change})


def test_a_scan_refuses_the_state_of_another_rule():
    _, state = scan()
    with pytest.raises(ValueError, match="made by the rule mlp/l2/anchored/momentum"):
        scan(state, MirasConfig(retention="sphere"))
    with pytest.raises(ValueError, match="state.chunk holds 2 tokens"):
        scan(type(state)(**{**vars(state), "read": state.read + 1}))


def test_the_layer_names_an_input_that_is_not_finite():
    x = torch.randn(1, 9, 16)
    x[0, 8, 3] = float("nan")
    with pytest.raises(ValueError, match="x must be finite, got NaN"):
        NeuralMemory(16)(x)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 8] = False
    assert torch.isfinite(NeuralMemory(16)(x, mask=mask)[:, :8]).all()


def test_a_state_replaces_a_state_and_nothing_else(saved, tmp_path):
    _, state, _ = saved
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine" * 9)
    with pytest.raises(ValueError, match=r"thesis\.txt is there and no state file"):
        state.save(thesis)
    assert thesis.read_text() == "mine" * 9
    for _ in range(2):
        state.save(tmp_path / "s")
    assert ModelState.load(tmp_path / "s").seen == state.seen


RESHAPED = (lambda x: x[..., :-1], lambda x: torch.cat((x, x), -1), lambda x: x[:1], lambda x: x.unsqueeze(1))


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_a_state_of_wrong_shapes_is_refused_before_anything_computes_with_it(variant):
    """Native code would read and write beside it."""
    model, fresh = small(variant), small(variant)
    made = model(ids()).state
    leaves = []
    walk(lambda leaf, x: leaves.append(leaf) or x, made.layers, path="layers")
    tried = [(leaf.path, i) for leaf in leaves for i in range(len(RESHAPED))]
    for path, i in tried:

        def change(leaf, x, path=path, i=i):
            last = leaf.columns == x.dim() - 1 or x.dim() == 1  # whose length may be any, or is the rows
            return RESHAPED[2 if last else i](x) if leaf.path == path else x

        wrong = replace(made, layers=walk(change, made.layers, path="layers"))
        with pytest.raises(ValueError, match=re.escape(f"state.{path} must have shape")):
            model(ids()[:, :1], state=wrong)
    with pytest.raises(ValueError, match="must have shape"):
        fresh(ids()[:, :1], state=wrong)
    assert fresh(ids()[:, :1], state=made).logits.isfinite().all()
